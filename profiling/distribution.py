"""The figures that describe a series of latencies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Distribution:
    """Minimum, mean, percentiles and maximum of `count` values, in their unit."""

    count: int
    min: float
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


def distribution(values: Iterable[float]) -> Distribution:
    """Of at least one value; percentiles are interpolated linearly between the two nearest values."""
    series = np.fromiter(values, np.float64)
    p50, p90, p95, p99 = (float(value) for value in np.percentile(series, (50, 90, 95, 99)))
    return Distribution(series.size, float(series.min()), float(series.mean()), p50, p90, p95, p99, float(series.max()))

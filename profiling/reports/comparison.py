"""How one profile differs from another, and whether the difference is larger than its noise.

The unit is a run (one repeat), whose median or total is one value: the steps inside a run follow each other and are not
independent. Of each metric the ratio of the medians is given with a 95 % interval by the percentile bootstrap over the
runs (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13), and the exact two-sided Mann-Whitney test
(Annals of Mathematical Statistics 18, 1947) of whether the runs of one profile are the slower ones. A difference counts
when the test says p < 0.05 and the interval leaves out 1; with fewer than four runs on each side no difference can.
Both profiles see only the variation within their own process: between processes and hours a machine varies more, so
take the two alternately, and more than once, before believing a difference of a few percent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import comb
from statistics import median
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from starling.engine.errors import UserError
from starling.profiling.reports.number_formats import load_warning

Document = Mapping[str, Any]
Verdict = Literal["lower", "higher", "within noise", "too few runs"]

LEVEL = 0.05
RESAMPLES = 10_000
LEAST_RUNS = 4


@dataclass(frozen=True, slots=True)
class Difference:
    """One metric of one point: medians over the runs of both, and B / A with its 95 % interval.

    `of` is LAST_ROW where a batch's run counts by its slowest row, else None.
    """

    prompt_tokens: int
    new_tokens: int
    batch: int
    metric: str
    of: str | None
    before: float
    after: float
    ratio: float
    low: float
    high: float
    p: float
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class SingleDifference:
    """A figure that each profile has once, so that nothing is known of its noise."""

    metric: str
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """`changed` names what else differs between the two, each as (what, A's, B's); `warnings` what spoils either."""

    differences: tuple[Difference, ...]
    singles: tuple[SingleDifference, ...]
    changed: tuple[tuple[str, str, str], ...]
    warnings: tuple[str, ...]


def compare(before: Document, after: Document) -> Comparison:
    """Compare two documents of `starling profile`, point by point. Raises UserError where they share no point."""
    points = [(a, b) for a in before["measurements"] for b in after["measurements"] if _point(a) == _point(b)]
    if not points:
        raise UserError(
            f"the profiles share no combination of lengths and batch ({_points(before)}; {_points(after)}): "
            "profile both with the same options"
        )
    differences = tuple(difference for a, b in points for difference in _differences(a, b))
    warned = ((name, load_warning(document["environment"])) for name, document in (("A", before), ("B", after)))
    return Comparison(
        differences,
        tuple(_singles(before, after)),
        tuple(_changed(before, after)),
        tuple(f"{name}: {text}" for name, text in warned if text is not None),
    )


def difference_of(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float, float, Verdict]:
    """Ratio of the medians after / before, its interval's ends, the test's p, and the verdict on `after`."""
    ratio, (low, high) = median(after) / median(before), bootstrap_ratio(before, after)
    p = mann_whitney(before, after)
    if min(len(before), len(after)) < LEAST_RUNS:
        return ratio, low, high, p, "too few runs"
    if p >= LEVEL or low <= 1 <= high:
        return ratio, low, high, p, "within noise"
    return ratio, low, high, p, "lower" if ratio < 1 else "higher"


def bootstrap_ratio(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Percentile bootstrap interval of median(after) / median(before), 1 - LEVEL wide; always the same resamples."""
    random = np.random.default_rng(0)
    ratios = _resampled_medians(after, random) / _resampled_medians(before, random)
    low, high = np.quantile(ratios, (LEVEL / 2, 1 - LEVEL / 2))
    return float(low), float(high)


def mann_whitney(before: Sequence[float], after: Sequence[float]) -> float:
    """Two-sided p of the Mann-Whitney U test, exact: the share of all orders that are at least as uneven.

    Ties count half a win each; with many of them the figure is only near.
    """
    first, second = len(before), len(after)
    wins = sum((a < b) + (a == b) / 2 for a in before for b in after)
    uneven = abs(wins - first * second / 2)
    orders = _orders(first, second)
    as_uneven = sum(count for u, count in enumerate(orders) if abs(u - first * second / 2) >= uneven - 1e-9)
    return as_uneven / comb(first + second, first)


def comparison_document(comparison: Comparison) -> dict[str, Any]:
    """The document of `profile --compare --json`."""
    return {
        "format": "starling-comparison",
        "format_version": 1,
        "method": {"interval": "percentile bootstrap over runs", "test": "exact Mann-Whitney U", "level": LEVEL},
        "differences": [asdict(difference) for difference in comparison.differences],
        "single_figures": [asdict(single) for single in comparison.singles],
        "changed": [{"what": what, "before": a, "after": b} for what, a, b in comparison.changed],
        "warnings": list(comparison.warnings),
    }


def _orders(first: int, second: int) -> list[int]:
    """How many of the orders of `first` + `second` values have U = 0, 1, …: the Gaussian binomial coefficient."""
    counts = [1]
    for k in range(1, first + 1):  # times (1 - q^(second + k)) / (1 - q^k)
        counts = _divide(_multiply(counts, second + k), k)
    return counts[: first * second + 1]


def _multiply(counts: list[int], power: int) -> list[int]:
    longer = counts + [0] * power
    return [value - (longer[i - power] if i >= power else 0) for i, value in enumerate(longer)]


def _divide(counts: list[int], power: int) -> list[int]:
    quotient: list[int] = []
    for i, value in enumerate(counts):
        quotient.append(value + (quotient[i - power] if i >= power else 0))
    return quotient[: len(quotient) - power]


def _resampled_medians(values: Sequence[float], random: np.random.Generator) -> NDArray[np.float64]:
    series = np.asarray(values, np.float64)
    medians: NDArray[np.float64] = np.median(random.choice(series, (RESAMPLES, len(series))), axis=1)
    return medians


LAST_ROW = "last row"
#: Metrics that have a value for each row of a run; that of the run is its slowest row's.
_OF_A_ROW = frozenset({"TTFT ms", "request latency ms"})
#: One value of each run, by metric.
_RUN_VALUES: dict[str, Callable[[list[Document]], float]] = {
    "TTFT ms": lambda rows: max(row["ttft_s"] for row in rows) * 1e3,
    "ITL p50 ms": lambda rows: median(rows[0]["itl_s"]) * 1e3,
    "ITL p99 ms": lambda rows: float(np.percentile(rows[0]["itl_s"], 99)) * 1e3,
    "TPOT ms": lambda rows: sum(rows[0]["itl_s"]) / len(rows[0]["itl_s"]) * 1e3,
    "request latency ms": lambda rows: max(row["ttft_s"] + sum(row["itl_s"]) for row in rows) * 1e3,
    "host µs a step": lambda rows: median(rows[0]["host_s"]) * 1e6,
}


def _differences(before: Document, after: Document) -> Iterator[Difference]:
    for metric, value in _RUN_VALUES.items():
        a, b = ([value(run) for run in measured["runs"]] for measured in (before, after))
        ratio, low, high, p, verdict = difference_of(a, b)
        of = LAST_ROW if before["batch"] > 1 and metric in _OF_A_ROW else None
        yield Difference(*_point(before), metric, of, median(a), median(b), ratio, low, high, p, verdict)


def _singles(before: Document, after: Document) -> Iterator[SingleDifference]:
    yield SingleDifference("load s", before["load_s"], after["load_s"])
    if before["cold_start"] and after["cold_start"]:
        yield SingleDifference("cold start s", before["cold_start"]["total_s"], after["cold_start"]["total_s"])
    for name in ("weights_bytes", "kv_cache_bytes", "peak_rss_bytes"):
        yield SingleDifference(
            f"{name.removesuffix('_bytes').replace('_', ' ')} MB",
            before["memory"][name] / 1e6,
            after["memory"][name] / 1e6,
        )
    if before["machine_peaks"] and after["machine_peaks"]:
        peaks = [document["machine_peaks"] for document in (before, after)]
        yield SingleDifference("machine GB/s", *(peak["read_bytes_per_second"] / 1e9 for peak in peaks))
        yield SingleDifference("machine GOP/s", *(peak["operations_per_second"] / 1e9 for peak in peaks))


def _changed(before: Document, after: Document) -> Iterator[tuple[str, str, str]]:
    a, b = _circumstances(before), _circumstances(after)
    for what in dict.fromkeys((*a, *b)):
        if a.get(what) != b.get(what):
            yield what, str(a.get(what, "none")), str(b.get(what, "none"))


def _circumstances(document: Document) -> dict[str, Any]:
    environment, bundle, run = document["environment"], document["bundle"], document["run"]
    return {
        "model": bundle["source"].get("name"),
        **{name: bundle[name] for name in ("dialect", "dtype", "quantization", "weights_sha256")},
        **{name: run.get(name) for name in ("backend", "provider", "kernels", "threads")},
        "speculation": run.get("speculation") or "off",
        "cpu": environment["machine"]["cpu"],
        "system": environment["system"],
        "python": environment["python"],
        **environment["packages"],
        **environment["variables"],
    }


def _point(measured: Document) -> tuple[int, int, int]:
    return measured["prompt_tokens"], measured["new_tokens"], measured["batch"]


def _points(document: Document) -> str:
    return ", ".join("/".join(map(str, _point(measured))) for measured in document["measurements"])

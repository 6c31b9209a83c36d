"""Llama 3's scaling of the rotary embedding, found again from the factors that a GGUF file has in its place.

llama.cpp's converter writes, for each frequency, what the formula divides it by (`rope_freqs.weight`), and none of the
formula's four numbers. Formula: transformers' `_compute_llama3_parameters`.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROPE_FACTORS = "rope_freqs.weight"
_LLAMA_3 = (1.0, 4.0, 8192)  # low_freq_factor, high_freq_factor, original_max_position_embeddings of every Llama 3.x
_TOLERANCE = 1e-5


def llama3_parameters(factors: NDArray[np.float64], theta: float) -> dict[str, Any] | None:
    """`rope_parameters` whose frequencies are divided by `factors` [head_dim / 2]; None where none are."""
    factor = round(float(factors[-1]), 4)
    for low, high, context in (_LLAMA_3, *_solved(factors, theta, factor)):
        if high > low and np.allclose(
            _factors(len(factors), theta, factor, low, high, context), factors, rtol=_TOLERANCE
        ):
            return {
                "rope_type": "llama3",
                "rope_theta": theta,
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": context,
            }
    return None


def _turns(count: int, theta: float) -> NDArray[np.float64]:
    """1 / wavelength of each frequency."""
    return theta ** (-np.arange(count) / count) / (2 * math.pi)


def _factors(count: int, theta: float, factor: float, low: float, high: float, context: int) -> NDArray[np.float64]:
    smooth = np.clip((context * _turns(count, theta) - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _solved(factors: NDArray[np.float64], theta: float, factor: float) -> list[tuple[float, float, int]]:
    """The numbers of another model, from two frequencies between the ends: only their ratios count, so low is 1."""
    between = np.flatnonzero((factors > 1 + 1e-4) & (factors < factor - 1e-4))
    if len(between) < 2:
        return []
    first, last = between[0], between[-1]
    smooth = (1 / factors - 1 / factor) / (1 - 1 / factor)
    turns = _turns(len(factors), theta)
    slope = (smooth[first] - smooth[last]) / (turns[first] - turns[last])
    offset = slope * turns[first] - smooth[first]  # low / (high - low)
    if offset <= 0:
        return []
    return [(1.0, round(1 + 1 / offset, 3), round(slope / offset))]

"""Choosing the next token from the model's logits, on the host, with numpy alone.

The order is that of transformers' `generate`: logits processors, temperature, top-k, top-p, min-p, then a draw.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from starling.engine.backends.backend import GREEDY, DeviceChoice
from starling.engine.backends.logits import Logits, check_finite
from starling.engine.errors import BackendError, SamplingError
from starling.engine.generation.logits_processors import LogitsProcessor
from starling.engine.generation.sampling_params import SamplingParams

Indices: TypeAlias = NDArray[np.int64]
# Takes the logits [vocab] float32 of one row, which it leaves as they are, and returns the id of the next token.
Sampler: TypeAlias = Callable[[Logits], int]

# Strides over which `top_candidates` takes maxima: enough to leave few candidates, few enough to be quick.
STRIDES = 32
# Weights that are summed at once before the draw looks inside.
BLOCK = 256
SMALLEST_TEMPERATURE = 1e-30


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probabilities under the model's raw logits; `top` has the likeliest tokens, the likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def make_sampler(params: SamplingParams, processors: Sequence[LogitsProcessor] = ()) -> Sampler:
    """The sampler of one sequence. It keeps state: its random numbers, and what its `processors` remember.

    The sampler raises BackendError where the logits hold no number to choose, and SamplingError where the processors
    leave none.
    """
    choose = _greedy if params.temperature == 0 else _random_choice(params)
    return _processed(choose, processors) if processors else choose


def device_choice(params: SamplingParams) -> DeviceChoice | None:
    """The choice that `params` ask for, which a device may be able to make; None where only the host can."""
    if params.is_greedy:
        return GREEDY
    if params.changes_logits or params.temperature == 0:
        return None
    temperature = max(params.temperature, SMALLEST_TEMPERATURE)
    return DeviceChoice(temperature, params.top_k, params.top_p, params.seed, params.min_p)


def logprobs(logits: Logits, token: int, top_n: int) -> TokenLogprob:
    """Log-probabilities of a token and of the `top_n` likeliest ones, from raw logits [vocab]; right to 1e-6."""
    peak = logits.max()
    # The summands may be float32, which halves the time; their sum and all that follows may not.
    log_total = float(peak) + math.log(np.exp(logits - peak).sum(dtype=np.float64))
    top: tuple[tuple[int, float], ...] = ()
    if top_n > 0:
        candidates = top_candidates(logits, top_n)
        likeliest = candidates[np.argsort(-logits[candidates], kind="stable")][:top_n]
        top = tuple((int(i), float(logits[i]) - log_total) for i in likeliest)
    return TokenLogprob(int(token), float(logits[token]) - log_total, top)


def top_candidates(logits: Logits, k: int) -> Indices:
    """Indices, ascending, of the values not less than the k-th greatest: k of them, or more where values are equal.

    The k-th greatest of the maxima over strided groups is no greater than the k-th greatest value, so that what is
    below it never has to be sorted.
    """
    if k >= logits.size:
        return np.arange(logits.size)
    groups = logits.size // STRIDES
    indices: Indices
    if k <= groups:
        maxima = logits[: groups * STRIDES].reshape(STRIDES, groups).max(axis=0)
        indices = np.flatnonzero(logits >= np.partition(maxima, groups - k)[groups - k])
    else:
        indices = np.arange(logits.size)
    values = logits[indices]
    enough: Indices = indices[values >= np.partition(values, values.size - k)[values.size - k]]
    return enough


def _greedy(logits: Logits) -> int:
    token = int(logits.argmax())
    check_finite(logits[token])
    return token


def _random_choice(params: SamplingParams) -> Sampler:
    generator = np.random.default_rng(params.seed)
    scale = np.float32(1 / max(params.temperature, SMALLEST_TEMPERATURE))
    work = np.empty(0, np.float32)

    def choose(logits: Logits) -> int:
        nonlocal work
        if work.size != logits.size:
            work = np.empty_like(logits)
        peak = logits[logits.argmax()]
        check_finite(peak)
        indices = _prefiltered(logits, float(peak), params)
        # In place: a fresh array of the vocabulary's size costs more in page faults than the arithmetic on it.
        weights = work if indices is None else work[: indices.size]
        np.subtract(logits if indices is None else logits[indices], peak, out=weights)
        np.multiply(weights, scale, out=weights)
        np.exp(weights, out=weights)
        bar = max(params.min_p, _nucleus_bar(weights, params.top_p))
        if bar == 0:
            drawn = _draw(weights, generator.random())
        else:
            kept = np.flatnonzero(weights >= bar)
            drawn = int(kept[_draw(weights[kept], generator.random())])
        return drawn if indices is None else int(indices[drawn])

    return choose


def _prefiltered(logits: Logits, peak: float, params: SamplingParams) -> Indices | None:
    """The only tokens that may be drawn, as far as that is known without probabilities; None for all."""
    if 0 < params.top_k < logits.size:
        return top_candidates(logits, params.top_k)
    if params.min_p > 0 and params.top_p == 1:
        # A little below the bar, which is applied exactly later.
        return np.flatnonzero(logits >= peak + params.temperature * (math.log(params.min_p) - 0.01))
    return None


def _nucleus_bar(weights: Logits, top_p: float) -> float:
    """The weight of the last token that is needed for `top_p` of the probability, the likeliest taken first."""
    if top_p == 1:
        return 0.0
    wanted = top_p * float(weights.sum(dtype=np.float64))
    # Sort only the tokens near the top, of which the likeliest weighs 1; lower the limit where they do not suffice.
    for limit in (1e-2, 1e-3, 1e-4, 0.0):
        near = weights[np.flatnonzero(weights >= limit)]
        if limit == 0 or near.sum(dtype=np.float64) >= wanted:
            break
    near[::-1].sort()
    last = np.searchsorted(np.cumsum(near, dtype=np.float64), wanted)
    return float(near[min(int(last), near.size - 1)])


def _processed(choose: Sampler, processors: Sequence[LogitsProcessor]) -> Sampler:
    """Chooses from a copy of the logits, which are the backend's own memory, that the processors have changed."""
    work = np.empty(0, np.float32)

    def choose_processed(logits: Logits) -> int:
        nonlocal work
        if work.size != logits.size:
            work = np.empty_like(logits)
        np.copyto(work, logits)
        for processor in processors:
            processor(work)
        try:
            token = choose(work)
        except BackendError:
            check_finite(logits[logits.argmax()])
            problem = "what the request forbids (bad_words, min_tokens, a grammar) leaves no token to choose"
            raise SamplingError(f"{problem}: forbid less") from None
        for processor in processors:
            processor.accept(token)
        return token

    return choose_processed


def _draw(weights: Logits, uniform: float) -> int:
    """The index at which the running sum of the weights passes `uniform` of their total; it looks at one block only."""
    starts = np.arange(0, weights.size, BLOCK)
    blocks = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    target = uniform * blocks[-1]
    block = min(int(np.searchsorted(blocks, target, side="right")), blocks.size - 1)
    inner = weights[block * BLOCK : (block + 1) * BLOCK]
    sums = np.cumsum(inner, dtype=np.float64) + (blocks[block - 1] if block else 0.0)
    inside = int(np.searchsorted(sums, target, side="right"))
    # After the end only by rounding; then the greatest, since the last may weigh nothing.
    return block * BLOCK + (inside if inside < inner.size else int(inner.argmax()))

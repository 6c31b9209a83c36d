"""Choosing the next token from the model's logits, on the host, with numpy alone.

The order is that of transformers' `generate`: repetition penalty, temperature, top-k, top-p, min-p, then a draw.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypedDict

import numpy as np
from numpy.typing import NDArray

from starling.engine.backends.backend import GREEDY, DeviceChoice
from starling.engine.backends.logits import Logits, check_finite
from starling.engine.errors import SamplingError, shown
from starling.engine.names import TOP_K_LIMIT

Indices: TypeAlias = NDArray[np.int64]
# Takes the logits [vocab] float32 of one row, which it leaves as they are, and returns the id of the next token.
Sampler: TypeAlias = Callable[[Logits], int]

# Strides over which `top_candidates` takes maxima: enough to leave few candidates, few enough to be quick.
STRIDES = 32
# Weights that are summed at once before the draw looks inside.
BLOCK = 256
SMALLEST_TEMPERATURE = 1e-30
# Of a repetition penalty: beyond, a logit times or divided by it is no float32.
PENALTIES = (1e-6, 1e6)
# Of `stop`: each token's text is compared with every one of them, whatever else runs meanwhile.
MOST_STOP_STRINGS, LONGEST_STOP = 64, 1024


class SamplingOverrides(TypedDict, total=False):
    """The fields of `SamplingParams` as keyword arguments, so that type checkers know the names; a list serves too."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    max_tokens: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int | None


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to stop. Raises SamplingError for a value of the wrong type or range.

    temperature: 0 takes the likeliest token (greedy) and ignores top_k, top_p, min_p and seed.
    top_k: keep the k likeliest tokens, and those as likely as the last of them; 0 keeps all.
    top_p: keep the likeliest tokens until their probability reaches p, and those as likely as the last; 1 keeps all.
    min_p: keep tokens at least p times as likely as the likeliest; 0 keeps all.
    repetition_penalty: above 1 makes tokens of the prompt and the answer less likely; 1 is off; 1e-6 to 1e6.
    seed: the same seed gives the same choices for the same logits; None draws a fresh one.
    max_tokens: the most tokens to generate.
    stop: up to 64 strings that end the text, not shown themselves.
    stop_token_ids: tokens that end it, beside the bundle's own.
    ignore_eos: go on after the bundle's end tokens.
    logprobs: how many of the likeliest tokens to report beside the chosen one's log-probability; None reports nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, "0 (greedy) or more", lambda x: x >= 0)
        _check_int("top_k", self.top_k, "0 (off) or more")
        _check_number("top_p", self.top_p, "above 0 and at most 1", lambda x: 0 < x <= 1)
        _check_number("min_p", self.min_p, "from 0 to 1", lambda x: 0 <= x <= 1)
        least, most = PENALTIES
        wanted = f"from {least:g} to {most:g}"
        _check_number("repetition_penalty", self.repetition_penalty, wanted, lambda x: least <= x <= most)
        check_max_tokens(self.max_tokens)
        for name in ("seed", "logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), "0 or more, or None")
        for name in ("stop", "stop_token_ids"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        _check_stops(_checked_tuple(self, "stop"))
        for index, token in enumerate(_checked_tuple(self, "stop_token_ids")):
            _check_int("stop_token_ids", token, "a token id", at=f"[{index}]")
        if not isinstance(self.ignore_eos, bool):
            raise SamplingError(f"ignore_eos is {shown(self.ignore_eos)}: give True or False", field="ignore_eos")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken as it is."""
        return self.temperature == 0 and self.repetition_penalty == 1


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probabilities under the model's raw logits; `top` has the likeliest tokens, the likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def check_max_tokens(value: Any, name: str = "max_tokens") -> None:
    """Raise SamplingError for a value that `SamplingParams.max_tokens` refuses; `name` is what its user calls it."""
    _check_int(name, value, "1 or more", least=1)


def make_sampler(params: SamplingParams, prompt_ids: Sequence[int] = ()) -> Sampler:
    """The sampler of one sequence. It keeps state: its random numbers, and what it chose where that is penalized.

    The sampler raises BackendError where the logits hold no number to choose.
    """
    choose = _greedy if params.temperature == 0 else _random_choice(params)
    if params.repetition_penalty == 1:
        return choose
    return _penalized(choose, params.repetition_penalty, prompt_ids)


def device_choice(params: SamplingParams) -> DeviceChoice | None:
    """The choice that `params` ask for, or None where only the host can make it."""
    if params.is_greedy:
        return GREEDY
    penalized = params.repetition_penalty != 1 or params.min_p > 0
    if penalized or params.temperature == 0 or not 1 <= params.top_k <= TOP_K_LIMIT:
        return None
    return DeviceChoice(max(params.temperature, SMALLEST_TEMPERATURE), params.top_k, params.top_p, params.seed)


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


def _penalized(choose: Sampler, penalty: float, prompt_ids: Sequence[int]) -> Sampler:
    """Divides positive and multiplies negative logits of every token seen before by the penalty (arXiv:1909.05858)."""
    seen = dict.fromkeys(prompt_ids)
    seen_ids = np.fromiter(seen, dtype=np.int64, count=len(seen))

    def choose_penalized(logits: Logits) -> int:
        nonlocal seen_ids
        penalized = logits.copy()
        values = penalized[seen_ids]
        penalized[seen_ids] = np.where(values < 0, values * np.float32(penalty), values / np.float32(penalty))
        token = choose(penalized)
        if token not in seen:
            seen[token] = None
            seen_ids = np.append(seen_ids, token)
        return token

    return choose_penalized


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


def _check_number(name: str, value: Any, wanted: str, test: Callable[[float], bool]) -> None:
    number = isinstance(value, int | float | np.floating | np.integer) and not isinstance(value, bool)
    if not number or not _is_finite(value) or not test(value):
        raise SamplingError(f"{name} is {shown(value)}: give a number {wanted}", field=name)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _check_stops(stops: tuple[Any, ...]) -> None:
    if len(stops) > MOST_STOP_STRINGS:
        raise SamplingError(f"stop has {len(stops)} strings: give at most {MOST_STOP_STRINGS}", field="stop")
    for index, text in enumerate(stops):
        if not isinstance(text, str) or not text:
            raise SamplingError(f"stop[{index}] is {shown(text)}: give a string that is not empty", field="stop")
        if len(text) > LONGEST_STOP:
            problem = f"stop[{index}] has {len(text)} characters: give at most {LONGEST_STOP}"
            raise SamplingError(problem, field="stop")


def _check_int(name: str, value: Any, wanted: str, *, least: int = 0, at: str = "") -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise SamplingError(f"{name}{at} is {shown(value)}: give a whole number, {wanted}", field=name)


def _checked_tuple(params: SamplingParams, name: str) -> tuple[Any, ...]:
    value: Any = getattr(params, name)
    if not isinstance(value, tuple):
        raise SamplingError(f"{name} is {shown(value)}: give a tuple, even for a single value", field=name)
    return value

"""What a request may say about how its tokens are chosen and when it ends."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias, TypedDict

import numpy as np

from starling.engine.errors import SamplingError, did_you_mean, shown
from starling.engine.text.grammar import GrammarSpec

# Of a repetition penalty: beyond, a logit times or divided by it is no float32.
PENALTIES = (1e-6, 1e6)
# Of `stop`: each token's text is compared with every one of them, whatever else runs meanwhile.
MOST_STOP_STRINGS, LONGEST_STOP = 64, 1024
# Of `bad_words`, each of at most LONGEST_STOP characters.
MOST_BAD_WORDS = 1024
# OpenAI's: of presence_penalty and frequency_penalty to either side of 0, and of a token's logit_bias.
MOST_COUNT_PENALTY, MOST_LOGIT_BIAS = 2, 100

#: Biases by token id, as a mapping or as pairs.
LogitBiases: TypeAlias = Mapping[int, float] | Sequence[tuple[int, float]]


class SamplingOverrides(TypedDict, total=False):
    """The fields of `SamplingParams` as keyword arguments, so that type checkers know the names; a list serves too."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: LogitBiases
    bad_words: Sequence[str]
    seed: int | None
    max_tokens: int
    min_tokens: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int | None
    prompt_logprobs: int | None
    grammar: GrammarSpec | None
    shown_tokens: Sequence[str]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to stop. Raises SamplingError for a value of the wrong type or range.

    temperature: 0 takes the likeliest token (greedy) and ignores top_k, top_p, min_p and seed.
    top_k: keep the k likeliest tokens, and those as likely as the last of them; 0 or -1 keeps all.
    top_p: keep the likeliest tokens until their probability reaches p, and those as likely as the last; 1 keeps all.
    min_p: keep tokens at least p times as likely as the likeliest; 0 keeps all.
    repetition_penalty: above 1 makes tokens of the prompt and the answer less likely; 1 is off; 1e-6 to 1e6.
    presence_penalty: is taken from the logit of each token that the answer has already; -2 to 2.
    frequency_penalty: the same for each time that the answer has it; -2 to 2.
    logit_bias: is added to the logits of tokens, by their ids; -100 to 100. A mapping becomes a tuple of pairs.
    bad_words: up to 1,024 texts whose tokens must not appear in the answer, neither alone nor after a space.
    seed: the same seed gives the same choices for the same logits; None or -1 draws a fresh one.
    max_tokens: the most tokens to generate; 0 runs the prompt alone.
    min_tokens: how many come before a token that ends the answer; stop strings are looked for after them.
    stop: up to 64 strings that end the text, not shown themselves.
    stop_token_ids: tokens that end it, beside the bundle's own.
    ignore_eos: go on after the bundle's end tokens.
    logprobs: how many of the likeliest tokens to report beside the chosen one's log-probability; None reports nothing.
    prompt_logprobs: the same for each token of the prompt, all of which is then run, whatever the cache holds of it.
    grammar: what the answer must look like. It ends where it is complete, as "stop"; one that "length" ends may not be.
    shown_tokens: special tokens whose text is part of the answer's; the others give none.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: LogitBiases = ()
    bad_words: tuple[str, ...] = ()
    seed: int | None = None
    max_tokens: int = 256
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: GrammarSpec | None = None
    shown_tokens: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, "0 (greedy) or more", lambda x: x >= 0)
        self._replace_off("top_k", 0)
        self._replace_off("seed", None)
        _check_int("top_k", self.top_k, "0 (off) or more")
        _check_number("top_p", self.top_p, "above 0 and at most 1", lambda x: 0 < x <= 1)
        _check_number("min_p", self.min_p, "from 0 to 1", lambda x: 0 <= x <= 1)
        least, most = PENALTIES
        wanted = f"from {least:g} to {most:g}"
        _check_number("repetition_penalty", self.repetition_penalty, wanted, lambda x: least <= x <= most)
        for name in ("presence_penalty", "frequency_penalty"):
            wanted = f"from {-MOST_COUNT_PENALTY} to {MOST_COUNT_PENALTY}"
            _check_number(name, getattr(self, name), wanted, lambda x: abs(x) <= MOST_COUNT_PENALTY)
        object.__setattr__(self, "logit_bias", _checked_biases(self.logit_bias))
        check_max_tokens(self.max_tokens)
        _check_int("min_tokens", self.min_tokens, "0 or more")
        if self.min_tokens > self.max_tokens:
            problem = f"min_tokens is {shown(self.min_tokens)}, but max_tokens is {shown(self.max_tokens)}"
            raise SamplingError(f"{problem}: give no more than that", field="min_tokens")
        for name in ("seed", "logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), "0 or more, or None")
        for name in ("stop", "stop_token_ids", "bad_words", "shown_tokens"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        _check_texts("stop", _checked_tuple(self, "stop"), MOST_STOP_STRINGS)
        _check_texts("bad_words", _checked_tuple(self, "bad_words"), MOST_BAD_WORDS)
        _check_texts("shown_tokens", _checked_tuple(self, "shown_tokens"), MOST_STOP_STRINGS)
        for index, token in enumerate(_checked_tuple(self, "stop_token_ids")):
            _check_int("stop_token_ids", token, "a token id", at=f"[{index}]")
        if not isinstance(self.ignore_eos, bool):
            raise SamplingError(f"ignore_eos is {shown(self.ignore_eos)}: give True or False", field="ignore_eos")
        if self.grammar is not None and not isinstance(self.grammar, GrammarSpec):
            raise SamplingError(f"grammar is {shown(self.grammar)}: give a GrammarSpec, or None", field="grammar")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken as it is."""
        return self.temperature == 0 and not self.changes_logits

    @property
    def changes_logits(self) -> bool:
        """Whether tokens are chosen from other logits than the model's."""
        penalized = self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        return penalized or bool(self.logit_bias or self.bad_words or self.min_tokens or self.grammar)

    def of_choice(self, index: int) -> "SamplingParams":
        """The settings of one of several answers to a prompt: each draws with a seed of its own, where there is one."""
        return self if self.seed is None or index == 0 else replace(self, seed=self.seed + index)

    def _replace_off(self, name: str, off: int | None) -> None:
        """-1 is other servers' word for a setting that is off."""
        value = getattr(self, name)
        if isinstance(value, int | np.integer) and value == -1:
            object.__setattr__(self, name, off)


def with_overrides(params: SamplingParams | None, overrides: Mapping[str, Any]) -> SamplingParams:
    """`params`, or the defaults, with `overrides` in place. Raises SamplingError for an unknown name or a bad value."""
    known = [field.name for field in fields(SamplingParams)]
    for name in overrides:
        if name not in known:
            near = did_you_mean(name, known)
            problem = f"unknown sampling setting {name!r}{near}; the settings are {', '.join(known)}"
            raise SamplingError(problem, field=name)
    return replace(params or SamplingParams(), **overrides)


def check_max_tokens(value: Any, name: str = "max_tokens") -> None:
    """Raise SamplingError for a value that `SamplingParams.max_tokens` refuses; `name` is what its user calls it."""
    _check_int(name, value, "0 or more")


def _check_number(name: str, value: Any, wanted: str, test: Callable[[float], bool]) -> None:
    number = isinstance(value, int | float | np.floating | np.integer) and not isinstance(value, bool)
    if not number or not _is_finite(value) or not test(value):
        raise SamplingError(f"{name} is {shown(value)}: give a number {wanted}", field=name)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _check_texts(name: str, texts: tuple[Any, ...], most: int) -> None:
    if len(texts) > most:
        raise SamplingError(f"{name} has {len(texts)} strings: give at most {most}", field=name)
    for index, text in enumerate(texts):
        if not isinstance(text, str) or not text:
            raise SamplingError(f"{name}[{index}] is {shown(text)}: give a string that is not empty", field=name)
        if len(text) > LONGEST_STOP:
            problem = f"{name}[{index}] has {len(text)} characters: give at most {LONGEST_STOP}"
            raise SamplingError(problem, field=name)


def _checked_biases(value: Any) -> tuple[tuple[int, float], ...]:
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, list | tuple) or not all(isinstance(one, list | tuple) and len(one) == 2 for one in pairs):
        raise SamplingError(f"logit_bias is {shown(value)}: give a mapping of token ids to numbers", field="logit_bias")
    wanted = f"from {-MOST_LOGIT_BIAS} to {MOST_LOGIT_BIAS}"
    for token, bias in pairs:
        _check_int("logit_bias", token, "a token id, for each bias")
        _check_number("logit_bias", bias, wanted, lambda x: abs(x) <= MOST_LOGIT_BIAS)
    if len(dict(pairs)) < len(pairs):
        raise SamplingError("logit_bias names a token id twice: give each one bias", field="logit_bias")
    return tuple((int(token), float(bias)) for token, bias in pairs)


def _check_int(name: str, value: Any, wanted: str, *, at: str = "") -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 0:
        raise SamplingError(f"{name}{at} is {shown(value)}: give a whole number, {wanted}", field=name)


def _checked_tuple(params: SamplingParams, name: str) -> tuple[Any, ...]:
    value: Any = getattr(params, name)
    if not isinstance(value, tuple):
        raise SamplingError(f"{name} is {shown(value)}: give a tuple, even for a single value", field=name)
    return value

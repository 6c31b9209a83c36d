"""The loads: how many streams at once, and what their prompts have in common."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from starling.engine.text.tokenizer import Tokenizer
from starling.profiling.exact_prompts import SENTENCES

PromptKind = Literal["unshared", "shared"]
KINDS: tuple[PromptKind, ...] = ("unshared", "shared")
#: Tokens of a prompt: all its own, or a prefix that all have and what is its own after it.
UNSHARED, PREFIX, OWN = 128, 512, 32
LONGEST = PREFIX + OWN


@dataclass(frozen=True, slots=True)
class Load:
    """So many streams that begin at the same time."""

    prompts: PromptKind
    streams: int


@dataclass(frozen=True, slots=True)
class Prompts:
    """Token ids of the streams, and of a prompt that a server has answered before them: it has their prefix."""

    streams: list[list[int]]
    known: list[int] | None


def loads(kinds: Sequence[PromptKind], streams: Sequence[int]) -> list[Load]:
    """All of them, the lightest first."""
    return [Load(kind, count) for kind in kinds for count in streams]


def prompts_of(load: Load, tokenizer: Tokenizer, draw: int) -> Prompts:
    """The prompts of the load in one round; two draws have none in common, and no prefix but the shared one."""
    base = f"{draw} {load.prompts} {load.streams}"
    if load.prompts == "unshared":
        return Prompts([text_tokens(tokenizer, UNSHARED, f"{base} {i}") for i in range(load.streams)], None)
    prefix = text_tokens(tokenizer, PREFIX, base)
    own = [_own_tokens(tokenizer, f"{base} {i}") for i in range(load.streams + 1)]
    return Prompts([[*prefix, *tail] for tail in own[1:]], [*prefix, *own[0]])


def text_tokens(tokenizer: Tokenizer, length: int, seed: str) -> list[int]:
    """`length` token ids (BOS included where the checkpoint has one) of sentences in an order that the seed draws."""
    return tokenizer.encode(_text(length, seed))[:length]


def _own_tokens(tokenizer: Tokenizer, seed: str) -> list[int]:
    return tokenizer.encode(f" {_text(OWN, seed)}", add_special_tokens=False)[:OWN]


def _text(length: int, seed: str) -> str:
    """At least `length` tokens, from a word on that few other texts begin with: servers find the start of a prompt."""
    chance = random.Random(seed)
    words = " ".join(SENTENCES).split()
    sentences = [" ".join(chance.sample(words, 3)).capitalize() + "."]
    while sum(len(sentence.split()) for sentence in sentences) < length:  # a word is at least a token
        sentences += chance.sample(SENTENCES, len(SENTENCES))
    return " ".join(sentences)

"""Texts through a PoolingBackend: short ones together in one run, a long one alone, a common beginning once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from starling.engine.backends.backend import chunk_length
from starling.engine.backends.pooling_backend import PoolingBackend, Vectors
from starling.engine.bundle.model_records import Pooling
from starling.engine.errors import BackendError
from starling.engine.generation.prompts import common_prefix

Ids = Sequence[int]

#: Tokens of a run that takes hardly longer than one of a single token.
WORTH_A_RUN = 32


def next_group(texts: Sequence[Ids], backend: PoolingBackend, long_from: int | None = None) -> list[int]:
    """Which of the waiting texts run together with the first one, which is among them: their indices.

    Those that begin as it does, where that saves work; else those of the nearest lengths, as far as one run takes them,
    padded as they are to the longest; the first alone where it is longer than a run. Beyond `long_from` tokens texts
    are rotated otherwise than below, and so run apart.
    """
    first = len(texts[0])
    alike = [i for i, text in enumerate(texts) if long_from is None or (len(text) > long_from) == (first > long_from)]
    family = _family(texts, alike, backend.max_batch)
    if len(family) > 1:
        return family
    group, longest = [0], first
    for index in sorted(alike[1:], key=lambda index: abs(len(texts[index]) - first)):
        longest = max(longest, len(texts[index]))
        if len(group) == backend.max_batch or longest * (len(group) + 1) > backend.run_tokens:
            break
        group.append(index)
    return group


def _family(texts: Sequence[Ids], alike: Sequence[int], most: int) -> list[int]:
    """The first text and those that share so much of its beginning that running it once saves work; else it alone."""
    beginning = tuple(texts[0][:WORTH_A_RUN])
    found = [0, *(i for i in alike[1:] if tuple(texts[i][:WORTH_A_RUN]) == beginning)][:most]
    if len(beginning) < WORTH_A_RUN or not saves_work(shared_prefix([texts[i] for i in found]), len(found)):
        return [0]
    return found


def run_group(backend: PoolingBackend, texts: Sequence[Ids], *, mean: bool = False) -> Iterator[Vectors | None]:
    """Run the texts of a group: None after each run but the last, then float32 [texts, width].

    They are the last tokens' own or, with `mean`, the mean over all tokens of a text, summed in float32. The keys and
    values are gone when it ends. Raises BackendError where a run fails.
    """
    shared = shared_prefix(texts)
    if len(texts) == 1 or saves_work(shared, len(texts)):
        yield from _run_in_turn(backend, texts, shared, mean)
        return
    longest = max(map(len, texts))
    cache = backend.new_cache(len(texts), longest)
    tokens = np.zeros((len(texts), longest), np.int64)  # what is after a text's end is not seen from before it
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    if mean:
        found = backend.run(cache, tokens, 0, range(longest))
        yield np.stack([vectors[: len(text)].mean(axis=0) for vectors, text in zip(found, texts, strict=True)])
        return
    ends = sorted({len(text) - 1 for text in texts})
    found = backend.run(cache, tokens, 0, ends)
    yield np.stack([found[row, ends.index(len(text) - 1)] for row, text in enumerate(texts)])


def _run_in_turn(backend: PoolingBackend, texts: Sequence[Ids], shared: int, mean: bool) -> Iterator[Vectors | None]:
    """What the texts begin with once, then the rest of each, over the keys and values of the one before it."""
    cache = backend.new_cache(1, max(map(len, texts)))
    found = np.zeros((len(texts), backend.width), np.float32)
    shared_sum = np.zeros(backend.width, np.float32)  # with `mean`: of what the texts begin with
    for index, text in enumerate(texts):
        ids = np.array([text], np.int64)
        start = shared if index else 0
        total = shared_sum
        while start < len(text):
            # The shared part ends with a run of its own, so that it is the same for every text.
            until = shared if start < shared else len(text)
            length = chunk_length(until - start, backend.run_tokens)
            kept = range(length) if mean else [length - 1]
            vectors = backend.run(cache, ids[:, start : start + length], start, kept)
            start += length
            if mean:
                total = total + vectors[0].sum(axis=0)
                if start == shared:
                    shared_sum = total
            if start < len(text):
                yield None
        found[index] = total / np.float32(len(text)) if mean else vectors[0, 0]
        if index + 1 < len(texts):
            yield None
    yield found


def shared_prefix(texts: Sequence[Ids]) -> int:
    """How many ids all of several texts begin with, less than any of them has; 0 for one alone."""
    if len(texts) < 2:
        return 0
    least = min(map(len, texts)) - 1
    first = texts[0]
    return min(least, *(common_prefix(first, text) for text in texts[1:]))


def saves_work(shared: int, texts: int) -> bool:
    """Whether it is less work to run a beginning once and each rest alone than all texts together.

    A run of few tokens takes about as long as one of WORTH_A_RUN: it reads all weights.
    """
    return shared * (texts - 1) > WORTH_A_RUN * texts


def run_all(backend: PoolingBackend, texts: Sequence[Ids], pooling: Pooling, *, finite: bool = True) -> Vectors:
    """Numbers float32 [texts, width] of all texts, in their order; the longest run first.

    Raises BackendError where a run fails or, with `finite`, a number is not finite.
    """
    found = np.zeros((len(texts), backend.width), np.float32)
    waiting = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
    while waiting:
        group = next_group([texts[index] for index in waiting], backend, pooling.long_from)
        chosen = [waiting[place] for place in group]
        for vectors in run_group(backend, [texts[index] for index in chosen], mean=pooling.read_at == "mean"):
            if vectors is not None:
                found[chosen] = vectors
        taken = set(chosen)
        waiting = [index for index in waiting if index not in taken]
    if finite:
        check_finite_numbers(found)
    return found


def check_finite_numbers(vectors: Vectors) -> None:
    """Raise BackendError where a number is not finite."""
    if not np.isfinite(vectors).all():
        raise BackendError("the model's numbers overflowed: a score is not finite; export it with --dtype fp32")

"""Texts through a PoolingBackend: short ones together in one run, a long one alone, chunk after chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from starling.engine.backends.backend import chunk_length
from starling.engine.backends.pooling_backend import PoolingBackend, Vectors
from starling.engine.errors import BackendError

Ids = Sequence[int]


def next_group(lengths: Sequence[int], backend: PoolingBackend, long_from: int | None = None) -> list[int]:
    """Which of the waiting texts run together with the first one, which is among them: indices into their `lengths`.

    Those of the nearest lengths, as far as one run takes them, padded as they are to the longest; the first alone where
    it is longer than a run. Beyond `long_from` texts are rotated otherwise than below.
    """
    first = lengths[0]
    if first > backend.run_tokens // 2:
        return [0]
    group, longest = [0], first
    for index in sorted(range(1, len(lengths)), key=lambda index: abs(lengths[index] - first)):
        longest = max(longest, lengths[index])
        same_kind = long_from is None or (lengths[index] > long_from) == (first > long_from)
        if len(group) == backend.max_batch or longest * (len(group) + 1) > backend.run_tokens or not same_kind:
            break
        group.append(index)
    return group


def run_group(backend: PoolingBackend, texts: Sequence[Ids]) -> Iterator[Vectors | None]:
    """Run the texts of a group: None after each run but the last, then float32 [texts, width], the last tokens' own.

    The keys and values are gone when it ends. Raises BackendError where a run fails.
    """
    longest = max(map(len, texts))
    cache = backend.new_cache(len(texts), longest)
    if len(texts) > 1:
        tokens = np.zeros((len(texts), longest), np.int64)  # what is after a text's end is not seen from before it
        for row, text in zip(tokens, texts, strict=True):
            row[: len(text)] = text
        ends = sorted({len(text) - 1 for text in texts})
        found = backend.run(cache, tokens, 0, ends)
        vectors = np.stack([found[row, ends.index(len(text) - 1)] for row, text in enumerate(texts)])
    else:
        tokens = np.array(texts, np.int64)
        start = 0
        while True:
            length = chunk_length(longest - start, backend.run_tokens)
            vectors = backend.run(cache, tokens[:, start : start + length], start, [length - 1])[:, 0]
            start += length
            if start == longest:
                break
            yield None
    yield vectors


def run_all(backend: PoolingBackend, texts: Sequence[Ids], long_from: int | None = None) -> Vectors:
    """Numbers float32 [texts, width] of all texts, in their order; the longest run first.

    Raises BackendError where a run fails or a number is not finite.
    """
    found = np.zeros((len(texts), backend.width), np.float32)
    waiting = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
    while waiting:
        group = next_group([len(texts[index]) for index in waiting], backend, long_from)
        chosen = [waiting[place] for place in group]
        for vectors in run_group(backend, [texts[index] for index in chosen]):
            if vectors is not None:
                found[chosen] = vectors
        taken = set(chosen)
        waiting = [index for index in waiting if index not in taken]
    check_finite_numbers(found)
    return found


def check_finite_numbers(vectors: Vectors) -> None:
    """Raise BackendError where a number is not finite."""
    if not np.isfinite(vectors).all():
        raise BackendError("the model's numbers overflowed: a score is not finite; export it with --dtype fp32")

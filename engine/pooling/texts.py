"""Which tokens of a text are run: those up to the one whose hidden state is read, of a text that is not too long."""

from __future__ import annotations

from collections.abc import Sequence

from starling.engine.bundle.model_records import Pooling, Side


def cut(ids: Sequence[int], most: int, side: Side, before: Sequence[int], after: Sequence[int]) -> list[int]:
    """At most `most` of the ids, without those at one side.

    What the tokenizer puts `before` and `after` a text stays where it is, as in transformers.
    """
    if len(ids) <= most:
        return list(ids)
    if side == "left":
        first = list(before) if list(ids[: len(before)]) == list(before) and len(before) < most else []
        return first + list(ids[len(ids) - most + len(first) :])
    last = list(after) if after and list(ids[-len(after) :]) == list(after) and len(after) < most else []
    return list(ids[: most - len(last)]) + last


def read_part(ids: Sequence[int], pooling: Pooling) -> Sequence[int]:
    """The ids up to the last token whose hidden state is read: what is after it changes nothing, attention is causal.

    A text of nothing but padding has its first token read by "last_but_pad", and its last by "before_first_pad".
    """
    if pooling.pad is None or pooling.pad not in ids or pooling.read_at in ("last", "mean"):
        return ids
    if pooling.read_at == "before_first_pad":
        return ids[: list(ids).index(pooling.pad) or len(ids)]
    length = len(ids)
    while length > 1 and ids[length - 1] == pooling.pad:
        length -= 1
    return ids[:length]

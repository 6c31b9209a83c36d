"""Tables of cosines and sines, and the proof that a model rotates the way the table is used.

A model has a module that makes position embeddings, and functions that rotate tensors by them. Both are tried with real
numbers: no name or signature says what they compute.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from starling.engine.errors import UnsupportedModelError

_PROBE_POSITIONS = 7
_BATCH, _QUERY_HEADS, _KEY_HEADS = 1, 3, 2  # all unlike each other and unlike the positions, so that axes are known

#: What a position embedding module returns: cosines and sines, or complex numbers.
Angles = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, eq=False)
class RotaryTable:
    """`cos`, `sin`: float32 [max_positions, rotary_dim / 2]; `interleaved` as in `dialects.dialect.Rotary`.

    `sorted_first`: channels 0, 2, … go before 1, 3, … and are then rotated as halves. `sequence_first`: tensors come as
    [batch, sequence, heads, head_dim], not as [batch, heads, sequence, head_dim].

    `long_from` (None: the numbers hold at every length): a sequence of more positions than this is rotated by other
    numbers from its first position on; `cos` and `sin` have those after the others, twice max_positions in all.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool
    sorted_first: bool
    sequence_first: bool
    long_from: int | None = None


def angles_by_length(
    of_first: Callable[[int], Angles], positions: int, original: int | None
) -> tuple[Angles, int | None]:
    """Angles of the positions 0 … positions - 1, and `long_from` as a RotaryTable has it.

    `of_first(n)` is what the model makes for a sequence of n positions: [1, n, …] each. `original` is the length up to
    which it may rotate otherwise.

    Raises:
        UnsupportedModelError: the angles change with the length in more than two kinds.
    """
    probe = min(_PROBE_POSITIONS, positions)
    short, whole = of_first(probe), of_first(positions)
    if _equal(short, _first_positions(whole, probe)):
        return whole, None
    if original is not None and original < positions:
        before, after = of_first(original), of_first(original + 1)
        if _equal(short, _first_positions(before, probe)) and _equal(after, _first_positions(whole, original + 1)):
            rest = positions - original  # positions that no short sequence has
            both = [
                torch.cat((a, b[:, :rest], b), dim=1) for a, b in zip(parts_of(before), parts_of(whole), strict=True)
            ]
            return both[0] if isinstance(whole, Tensor) else tuple(both), original
    raise UnsupportedModelError("its rotary embedding changes with the length of the sequence")


def make_table(
    angles: Angles, apply: Callable[..., tuple[Tensor, ...]], dim: int, name: str, long_from: int | None = None
) -> RotaryTable:
    """The table of what a position embedding module returned, found by trying the model's own function against ours.

    `angles`: for one row, [1, positions, …] each. `apply(angles, *tensors)` rotates one or two tensors whose last axis
    has `dim` channels. `name` is said in a refusal.

    Raises:
        UnsupportedModelError: the model rotates in a way that no rotary table expresses.
    """
    cos, sin = (t[0].float() for t in _cos_sin(angles, name))
    some = _first_positions(angles, min(_PROBE_POSITIONS, len(cos)))
    for halve, sense, interleaved, sorted_first, sequence_first in product(
        (_first_half, _every_other, _all), (1, -1), (False, True), (False, True), (False, True)
    ):
        half_cos, half_sin = halve(cos).contiguous(), sense * halve(sin).contiguous()
        table = RotaryTable(half_cos, half_sin, interleaved, sorted_first, sequence_first, long_from)
        possible = 0 < 2 * table.cos.shape[1] <= dim and not (interleaved and sorted_first)
        if possible and _rotates_alike(table, some, apply, dim):
            return table
    raise UnsupportedModelError(
        f"{name}: its rotary embedding is neither of the half-rotated nor of the interleaved form"
    )


def rotate(x: Tensor, table: RotaryTable) -> Tensor:
    """Rotate x [batch, heads, sequence, head_dim] at the positions 0 … sequence - 1 (RoFormer, arXiv 2104.09864)."""
    half = table.cos.shape[1]
    cos, sin = table.cos[: x.shape[2]], table.sin[: x.shape[2]]
    turned, kept = x[..., : 2 * half], x[..., 2 * half :]
    if table.sorted_first:
        turned = even_first(turned)
    if table.interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned, kept), dim=-1)


def even_first(x: Tensor) -> Tensor:
    """The channels 0, 2, 4, … of the last axis, then 1, 3, 5, …."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2).transpose(-1, -2).reshape(x.shape)


def _cos_sin(angles: Angles, name: str) -> tuple[Tensor, Tensor]:
    if isinstance(angles, Tensor):
        if angles.is_complex():
            return angles.real, angles.imag
    elif len(angles) == 2:
        return angles[0], angles[1]
    raise UnsupportedModelError(f"{name}: its position embedding is neither cosines and sines nor complex numbers")


def parts_of(angles: Angles) -> tuple[Tensor, ...]:
    """Cosines and sines, or the one tensor that is both."""
    return (angles,) if isinstance(angles, Tensor) else angles


def _equal(a: Angles, b: Angles) -> bool:
    return all(torch.equal(x, y) for x, y in zip(parts_of(a), parts_of(b), strict=True))


def _first_positions(angles: Angles, count: int) -> Angles:
    return angles[:, :count] if isinstance(angles, Tensor) else tuple(t[:, :count] for t in angles)


def _first_half(t: Tensor) -> Tensor:
    return t[:, : t.shape[1] // 2]


def _every_other(t: Tensor) -> Tensor:
    return t[:, ::2]


def _all(t: Tensor) -> Tensor:
    return t


def _rotates_alike(table: RotaryTable, angles: Angles, apply: Callable[..., tuple[Tensor, ...]], dim: int) -> bool:
    """Whether `apply` does to a query and a key (or to one tensor) what `rotate` does by this table."""
    positions = (angles if isinstance(angles, Tensor) else angles[0]).shape[1]
    generator = torch.Generator().manual_seed(0)
    query, key = (
        torch.randn(_BATCH, heads, positions, dim, generator=generator) for heads in (_QUERY_HEADS, _KEY_HEADS)
    )
    given = tuple(x.transpose(1, 2) if table.sequence_first else x for x in (query, key))
    try:
        theirs = apply(angles, *given)
    except (RuntimeError, IndexError):  # the axes do not fit
        return False
    if table.sequence_first:
        theirs = tuple(t.transpose(1, 2) for t in theirs)
    expected = (rotate(x, table) for x in (query, key))
    return all(t.shape == e.shape and torch.allclose(t, e, atol=1e-5) for t, e in zip(theirs, expected, strict=False))

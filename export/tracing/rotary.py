"""Tables of cosines and sines, and the proof that a model rotates the way the table is used."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from starling.engine.errors import UnsupportedModelError

_PROBE_POSITIONS = 7


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """`cos`, `sin`: float32 [max_positions, rotary_dim / 2]; `interleaved` as in `dialects.base.Rotary`."""

    cos: Tensor
    sin: Tensor
    interleaved: bool


def make_table(
    embedding: nn.Module,
    arguments: tuple[Any, ...],
    apply: Callable[..., tuple[Tensor, Tensor]],
    positions: int,
    dim: int,
) -> RotaryTable:
    """The table of a rotary embedding module, found by trying the model's own `apply_rotary_pos_emb` against ours.

    `embedding` is the model's module with real buffers; `arguments` what it takes after the position ids; `dim` the
    head's width.

    Raises:
        UnsupportedModelError: the model rotates in a way that no rotary table expresses.
    """
    ids = torch.arange(positions)[None]
    cos, sin = (t[0].float() for t in embedding(torch.zeros(1, 1, dim), ids, *arguments))
    for interleaved, halve in ((False, _first_half), (True, _first_half), (True, _every_other)):
        table = RotaryTable(halve(cos).contiguous(), halve(sin).contiguous(), interleaved)
        if 2 * table.cos.shape[1] <= dim and _rotates_alike(table, cos, sin, apply, dim):
            return table
    raise UnsupportedModelError(
        f"{type(embedding).__name__}: its rotary embedding is neither of the half-rotated nor of the interleaved form"
    )


def rotate(x: Tensor, table: RotaryTable) -> Tensor:
    """Rotate x [batch, heads, sequence, head_dim] at the positions 0 … sequence - 1 (RoFormer, arXiv 2104.09864)."""
    half = table.cos.shape[1]
    cos, sin = table.cos[: x.shape[2]], table.sin[: x.shape[2]]
    turned, kept = x[..., : 2 * half], x[..., 2 * half :]
    if table.interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned, kept), dim=-1)


def _first_half(t: Tensor) -> Tensor:
    return t[:, : t.shape[1] // 2]


def _every_other(t: Tensor) -> Tensor:
    return t[:, ::2]


def _rotates_alike(
    table: RotaryTable, cos: Tensor, sin: Tensor, apply: Callable[..., tuple[Tensor, Tensor]], dim: int
) -> bool:
    n = min(_PROBE_POSITIONS, cos.shape[0])
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 2, n, dim, generator=generator)
    key = torch.randn(1, 1, n, dim, generator=generator)
    theirs = apply(query, key, cos[None, :n], sin[None, :n])
    return all(torch.allclose(t, rotate(x, table), atol=1e-5) for t, x in zip(theirs, (query, key), strict=True))

"""Weights that a checkpoint keeps as whole numbers with scales, as they are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class StoredGrid:
    """weight = (code - zero) * scale, with a scale and a zero point for `group` neighbouring inputs of an output row.

    Codes are 0 … 2**bits - 1. `zero` is every zero point; None: each group has its own. `exact_in` are the types that
    have every scale as it is.
    """

    bits: int
    group: int
    zero: int | None
    exact_in: frozenset[torch.dtype]


class StoredRows(NamedTuple):
    """Rows of such a weight: `codes` int16 [n, columns], `scales` float32 and `zeros` int16 [n, groups]."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor


class PackedSource(Protocol):
    """What a checkpoint says of its quantized tensors, under the names of its TensorSource, which dequantizes them."""

    def packing(self, name: str) -> str | None:
        """What a tensor is stored as, such as Q4_K; None: it is not quantized."""

    def grid(self, name: str) -> StoredGrid | None:
        """How the numbers of a tensor are to be read; None where it is no grid of this kind."""

    def stored_rows(self, name: str, start: int, stop: int) -> StoredRows:
        """Rows `start:stop` of a tensor that has a grid."""

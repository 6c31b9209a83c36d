"""A quantized matrix of a checkpoint, read by the rows of torch.nn.Linear, and the numbers in its words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from starling.export.checkpoints.stored_grid import StoredGrid, StoredRows

Read = Callable[[int, int], Tensor]


@dataclass(frozen=True, slots=True)
class IntegerWeight:
    """A matrix [outputs, inputs] of (code - zero) * scale, of the stored tensors `parts`; `label` names its method.

    `places` has the group of each input where they are not in order, else None.
    """

    label: str
    shape: tuple[int, int]
    parts: tuple[str, ...]
    bits: int
    group: int
    codes: Read
    scales: Read
    zeros: Read
    places: Tensor | None = None

    def values(self, start: int, stop: int) -> Tensor:
        """Rows `start:stop`, float32."""
        codes, scales, zeros = self.stored(start, stop)
        groups = torch.arange(self.shape[1]) // self.group if self.places is None else self.places
        return (codes - zeros[:, groups]).float() * scales[:, groups]

    def grid(self) -> StoredGrid | None:
        """See PackedSource."""
        if self.places is not None:
            return None
        scales, zeros = self.scales(0, self.shape[0]), self.zeros(0, self.shape[0])
        types = (torch.float32, torch.float16, torch.bfloat16)
        exact = frozenset(dtype for dtype in types if torch.equal(scales.to(dtype).float(), scales))
        first = int(zeros[0, 0])
        return StoredGrid(self.bits, self.group, first if bool((zeros == first).all()) else None, exact)

    def stored(self, start: int, stop: int) -> StoredRows:
        """See PackedSource."""
        return StoredRows(self.codes(start, stop), self.scales(start, stop), self.zeros(start, stop))


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A matrix of float8_e4m3 times a scale for each `block` of rows and columns; see IntegerWeight."""

    label: str
    shape: tuple[int, int]
    parts: tuple[str, ...]
    block: tuple[int, int]
    floats: Read
    scales: Tensor

    def values(self, start: int, stop: int) -> Tensor:
        """Rows `start:stop`, float32."""
        rows, columns = (torch.arange(size) // block for size, block in zip(self.shape, self.block, strict=True))
        return self.floats(start, stop).float() * self.scales[rows[start:stop]][:, columns]

    def grid(self) -> None:
        """See PackedSource."""

    def stored(self, start: int, stop: int) -> StoredRows:
        """See PackedSource."""
        raise TypeError("floats are no whole numbers")


PackedWeight = IntegerWeight | Fp8Weight


def unpacked(words: Tensor, bits: int) -> Tensor:
    """The numbers int16 in int32 words [..., n]: [..., n * 32 / bits], each word's lowest first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return (words.contiguous()[..., None] >> shifts).bitwise_and_(2**bits - 1).to(torch.int16).flatten(-2)


def across(words: Read, bits: int, start: int, stop: int, places: tuple[int, ...] | None = None) -> Tensor:
    """Rows `start:stop` of numbers of which neighbouring rows lie in a word; `words` reads rows of words.

    `places` says where in a word its rows are, if not in order.
    """
    per_word = 32 // bits
    first = start // per_word
    found = unpacked(words(first, -(-stop // per_word)).T, bits)
    if places is not None:
        found = found.view(len(found), -1, per_word)[..., list(places)].flatten(-2)
    return found.T[start - first * per_word : stop - first * per_word]

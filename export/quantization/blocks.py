"""Weight-only quantization in blocks, in the layout of com.microsoft MatMulNBits and GatherBlockQuantized."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from starling.engine.errors import UserError
from starling.export.quantization.block_search import search_grid

if TYPE_CHECKING:  # the settings are looked at before PyTorch is loaded
    from torch import Tensor

BITS = {"int8": 8, "int4": 4}
BLOCK_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class BlockQuantization:
    """Unsigned integers with a scale and a zero point per `block_size` neighbouring inputs of one output row.

    `symmetric` fixes the zero point in the middle; None does so for int8, which loses nothing by it (mean KL on SmolLM2
    0.0037 nats, 0.0042 with zero points of their own), where int4 does.
    With `mean_bits` the projections that lose most by 4 bits get 8, so that a weight of a projection has so many on
    average. `accuracy_level` is MatMulNBits' own: 4 multiplies in int8 with activations quantized on the fly, 0 in the
    activations' type.
    """

    scheme: str
    block_size: int = 32
    symmetric: bool | None = None
    accuracy_level: int = 4
    mean_bits: float | None = None

    def __post_init__(self) -> None:
        """Raises UserError where a setting is none that the kernels know."""
        if self.scheme not in BITS:
            raise UserError(f"unknown quantization {self.scheme!r}; known are {', '.join(sorted(BITS))}")
        if self.block_size not in BLOCK_SIZES:
            raise UserError(f"block size {self.block_size} is not one of {', '.join(map(str, BLOCK_SIZES))}")
        if self.accuracy_level not in range(5):
            raise UserError(f"accuracy level {self.accuracy_level} is not between 0 and 4")
        if self.mean_bits is not None and (self.scheme != "int4" or not 4 <= self.mean_bits <= 8):
            raise UserError(f"{self.mean_bits} bits a weight: give 4 to 8, for int4")

    @property
    def is_symmetric(self) -> bool:
        """Whether every zero point is the middle of the range."""
        return self.scheme == "int8" if self.symmetric is None else self.symmetric

    @property
    def bits(self) -> int:
        """Bits per weight."""
        return BITS[self.scheme]

    def blocks(self, columns: int) -> int:
        """Blocks in a row; the last may be shorter."""
        return -(-columns // self.block_size)

    def at(self, bits: int) -> BlockQuantization:
        """The same with so many bits: of an int4 bundle, what is kept in 8 bits is as in an int8 bundle."""
        return self if bits == self.bits else replace(self, scheme=f"int{bits}", symmetric=None, mean_bits=None)

    def to_json(self) -> dict[str, Any]:
        """The `quantization` object of bundle.json."""
        return {
            "scheme": self.scheme,
            "block_size": self.block_size,
            "symmetric": self.is_symmetric,
            "accuracy_level": self.accuracy_level,
        }


class QuantizedRows(NamedTuple):
    """Rows in blocks: weight = (data - zero_point) * scale.

    `data` uint8 [n, blocks, block_size * bits / 8], low nibble first; `scales` float32 [n, blocks]; `zeros` uint8
    [n, ceil(blocks * bits / 8)].
    """

    data: Tensor
    scales: Tensor
    zeros: Tensor


def quantize_rows(rows: Tensor, how: BlockQuantization, importance: Tensor | None = None) -> QuantizedRows:
    """Round rows [n, columns] of any float type.

    4 bits: with the scales of least squared error, in which a column counts by its `importance` [columns] (None: all
    the same). Scales are values of float16, so that they can be kept in two bytes.
    """
    import torch

    n, columns = rows.shape
    padded = torch.nn.functional.pad(rows.float(), (0, how.blocks(columns) * how.block_size - columns))
    blocks = padded.view(n, how.blocks(columns), how.block_size)
    if how.bits == 4:
        scale, zero = _searched(blocks, how, importance)
    else:
        scale, zero = _whole_range(blocks, how)
    data = (blocks / scale[..., None]).round_().add_(zero[..., None]).clamp_(0, 2**how.bits - 1)
    return pack_blocks(data.flatten(1).to(torch.uint8), scale, zero, how)


def pack_blocks(codes: Tensor, scales: Tensor, zeros: Tensor, how: BlockQuantization) -> QuantizedRows:
    """Whole numbers uint8 [n, columns] as they are stored, with scales and zero points [n, blocks] of any type.

    A last block that is shorter is filled with its zero point.
    """
    import torch

    missing = how.blocks(codes.shape[1]) * how.block_size - codes.shape[1]
    whole = [codes, zeros[:, -1:].to(torch.uint8).expand(-1, missing)]
    data = torch.cat(whole, dim=1).view(len(codes), -1, how.block_size)
    zeros = zeros.to(torch.uint8)
    if how.bits == 4:
        data, zeros = _pack_nibbles(data), _pack_nibbles(zeros)
    return QuantizedRows(data, scales, zeros)


def dequantize(found: QuantizedRows, how: BlockQuantization, columns: int) -> Tensor:
    """The weights float32 [n, columns] that the numbers stand for."""
    data, zeros = found.data, found.zeros
    if how.bits == 4:
        data, zeros = _unpack_nibbles(data), _unpack_nibbles(zeros)[:, : found.scales.shape[1]]
    values = data.float().sub_(zeros.float()[..., None]).mul_(found.scales[..., None])
    return values.flatten(1)[:, :columns]


def _searched(blocks: Tensor, how: BlockQuantization, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scales and zero points [n, blocks], block after block, so that what is worked on stays in the cache."""
    import torch

    count, size = blocks.shape[1:]
    weigh = torch.ones(count * size, device=blocks.device) if importance is None else importance
    weigh = torch.nn.functional.pad(weigh, (0, count * size - len(weigh))).view(count, size, 1)
    found = [
        search_grid(blocks[:, i].T.contiguous(), weigh[i], how.bits, symmetric=how.is_symmetric) for i in range(count)
    ]
    scales, zeros = zip(*found, strict=True)
    return torch.stack(scales, dim=1), torch.stack(zeros, dim=1)


def _whole_range(blocks: Tensor, how: BlockQuantization) -> tuple[Tensor, Tensor]:
    """Scales and zero points [n, blocks] with which nothing is cut off; the scale of zeros is 1."""
    import torch

    top = 2**how.bits - 1
    if how.is_symmetric:
        middle = 2 ** (how.bits - 1)
        scale = _float16_above(blocks.abs().amax(dim=2) / (middle - 1))
        zero = torch.full_like(scale, middle)
    else:
        low, high = blocks.amin(dim=2).clamp_(max=0), blocks.amax(dim=2).clamp_(min=0)
        scale = _float16_above((high - low) / top)
        zero = torch.where(scale > 0, -low / scale, 0).round_().clamp_(0, top)
    return torch.where(scale > 0, scale, 1.0), zero


def _float16_above(scale: Tensor) -> Tensor:
    """The least float16 values not below `scale` (>= 0), as float32: rounded down, a block's ends would be cut off."""
    import torch

    half = scale.half()
    above = (half.view(torch.int16) + 1).view(torch.float16)  # the next one: positive floats are ordered by their bits
    return torch.where(half.float() < scale, above, half).float()


def _pack_nibbles(values: Tensor) -> Tensor:
    """Two values of the last axis per byte, the first in the low nibble."""
    import torch

    even = torch.nn.functional.pad(values, (0, values.shape[-1] % 2))
    return even[..., 0::2] | (even[..., 1::2] << 4)


def _unpack_nibbles(values: Tensor) -> Tensor:
    import torch

    return torch.stack((values & 15, values >> 4), dim=-1).flatten(-2)

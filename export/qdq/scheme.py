"""Symmetric quantization as explicit QuantizeLinear/DequantizeLinear takes it: settings, scales and values.

Zero points are 0 everywhere, as TensorRT requires. Weights are [out, in] here, as checkpoints hold them.
"""

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from starling.engine.errors import UserError
from starling.export.quantization import BLOCK_SIZES

DEFAULT_SMOOTHING = 0.8  # see profiling/results/quality-w8a8-smollm2.json
#: Mean KL in nats above which a bundle with quantized activations is not written unless it is asked for.
MAX_MEAN_KL = 0.05
_INT4_BLOCK = 128


@dataclass(frozen=True, slots=True)
class Grid:
    """The numbers that quantized values are rounded to: those of `stored` from `low` to `top`."""

    stored: ir.DataType
    torch_dtype: torch.dtype
    low: float
    top: float


INT8 = Grid(ir.DataType.INT8, torch.int8, -128, 127)
INT4 = Grid(ir.DataType.INT4, torch.int8, -8, 7)
FP8 = Grid(ir.DataType.FLOAT8E4M3FN, torch.float8_e4m3fn, -448, 448)

_WEIGHTS = {"int8": INT8, "int4": INT4, "w8a8": INT8, "fp8": FP8}
_ACTIVATIONS = {"w8a8": INT8, "fp8": FP8}


@dataclass(frozen=True, slots=True)
class QdqQuantization:
    """Which numbers are quantized, and how finely.

    `block_size` None: one scale per output channel, else one per so many neighbouring inputs of it. `head` quantizes
    lm_head too. `smoothing` is SmoothQuant's alpha, 0 for none. `keep` are patterns of weight names that stay in the
    model's dtype; None leaves the choice to the export (where activations are quantized).
    """

    scheme: str
    block_size: int | None = None
    head: bool = False
    smoothing: float | None = None
    keep: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Fill in the scheme's defaults. Raises UserError where settings do not go together."""
        if self.scheme not in _WEIGHTS:
            raise UserError(f"unknown quantization {self.scheme!r}; known are {', '.join(sorted(_WEIGHTS))}")
        if self.block_size is not None and self.block_size not in BLOCK_SIZES:
            raise UserError(f"block size {self.block_size} is not one of {', '.join(map(str, BLOCK_SIZES))}")
        if self.activations is not None and self.block_size is not None:
            raise UserError(f"{self.scheme} has one scale per output channel: leave --block-size out")
        if self.activations is None and self.smoothing is not None:
            raise UserError(f"smoothing is about quantized activations: {self.scheme} has none, use w8a8 or fp8")
        if self.smoothing is not None and not 0 <= self.smoothing <= 1:
            raise UserError(f"smoothing {self.smoothing:g} is not between 0 (none) and 1")
        if self.scheme == "int4" and self.block_size is None:
            object.__setattr__(self, "block_size", _INT4_BLOCK)
        if self.activations is not None and self.smoothing is None:
            object.__setattr__(self, "smoothing", DEFAULT_SMOOTHING)

    @property
    def weights(self) -> Grid:
        """What weights are rounded to."""
        return _WEIGHTS[self.scheme]

    @property
    def activations(self) -> Grid | None:
        """What the projections' inputs are rounded to; None where they stay in the model's dtype."""
        return _ACTIVATIONS.get(self.scheme)

    def block_for(self, columns: int) -> int | None:
        """The block size for a weight of so many inputs: TensorRT wants whole blocks, so it may be a smaller one.

        Raises UserError where not even the smallest block divides the width.
        """
        if self.block_size is None:
            return None
        fitting = [size for size in BLOCK_SIZES if size <= self.block_size and columns % size == 0]
        if not fitting:
            raise UserError(f"a weight is {columns} wide, which no block of {BLOCK_SIZES[0]} divides: use --quant int8")
        return fitting[-1]

    def to_json(self) -> dict[str, Any]:
        """The `quantization` object of bundle.json, without what the export finds out."""
        return {
            "scheme": self.scheme,
            "block_size": self.block_size,
            "symmetric": True,
            "accuracy_level": None,
            "head": self.head,
            "smoothing": self.smoothing,
        }


def weight_scales(rows: Tensor, grid: Grid, block: int | None, dtype: torch.dtype) -> Tensor:
    """One scale per row and block, [n, columns / block] (or [n, 1]) in `dtype`; `rows` [n, columns] of any float type.

    A block of zeros has the scale 1; none is so small that dividing by it gives infinity.
    """
    blocks = rows.float().view(len(rows), -1, block or rows.shape[1])
    scales = blocks.abs().amax(dim=2) / grid.top
    smallest = torch.finfo(dtype).tiny
    return torch.where(scales > 0, scales.clamp(min=smallest), 1.0).to(dtype)


def quantize(values: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """`values` / `scales` rounded to the grid (half to even) and held within it; `scales` broadcasts."""
    scaled = values.float() / scales.float()
    if not grid.torch_dtype.is_floating_point:
        scaled = scaled.round_()
    return scaled.clamp_(grid.low, grid.top).to(grid.torch_dtype)


def quantize_weight(rows: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """`rows` [n, columns] on the grid, with the scales [n, blocks] that `weight_scales` gave for them."""
    blocks = rows.view(len(rows), scales.shape[1], -1)
    return quantize(blocks, scales[..., None], grid).flatten(1)


def round_to_grid(values: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """What is left of `values` after quantizing and dequantizing, in float32."""
    return quantize(values, scales, grid).float() * scales.float()


def pack_int4(values: Tensor) -> Tensor:
    """Two int8 values from -8 to 7 per byte in memory order, the first in the low nibble; uint8 [ceil(n / 2)]."""
    flat = values.reshape(-1)
    even = torch.nn.functional.pad(flat, (0, flat.numel() % 2)).view(torch.uint8) & 15
    return even[0::2] | (even[1::2] << 4)

"""Symmetric quantization as explicit QuantizeLinear/DequantizeLinear takes it: grids, scales and values.

Zero points are 0 everywhere, as TensorRT requires. Weights are [out, in] here, as checkpoints hold them.
"""

from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

#: Mean KL in nats above which a bundle with quantized activations is not written unless it is asked for.
MAX_MEAN_KL = 0.05


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

#: What weights, and the projections' inputs, are rounded to by scheme.
WEIGHT_GRIDS = {"int8": INT8, "int4": INT4, "w8a8": INT8, "fp8": FP8}
ACTIVATION_GRIDS = {"w8a8": INT8, "fp8": FP8}


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

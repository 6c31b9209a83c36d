"""Weights that the checkpoint has quantized itself: taken bit for bit where the bundle's blocks can hold them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
import torch

from starling.engine.errors import CheckpointError
from starling.export.checkpoints.stored_grid import PackedSource, StoredGrid
from starling.export.quantization.block_plan import BlockPlan
from starling.export.quantization.blocks import BlockQuantization, QuantizedRows, pack_blocks
from starling.export.weights.weight_plan import Blocks, ExpertBlocks, weight_of

_TYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class StoredBlocks:
    """The checkpoint's tensors in `grids` go into the bundle as they are stored; `notes` count them, and the others."""

    source: PackedSource
    grids: Mapping[str, StoredGrid]
    notes: tuple[str, ...]

    def rows(self, name: str, start: int, stop: int, how: BlockQuantization) -> QuantizedRows:
        """Rows `start:stop` of a tensor in `grids`, in blocks.

        Raises CheckpointError where a scale is no finite number.
        """
        grid, (codes, scales, zeros) = self.grids[name], self.source.stored_rows(name, start, stop)
        if not bool(scales.isfinite().all()):
            raise CheckpointError(f"tensor {name} has a scale that is no finite number: get the file again")
        blocks, repeats = how.blocks(codes.shape[1]), max(1, grid.group // how.block_size)
        scales, zeros = (each.repeat_interleave(repeats, dim=1)[:, :blocks] for each in (scales, zeros))
        if grid.bits != how.bits:  # around the middle of more bits
            shift = 2 ** (how.bits - 1) - zeros
            codes = codes + shift.repeat_interleave(how.block_size, dim=1)[:, : codes.shape[1]]
            zeros = zeros + shift
        return pack_blocks(codes.to(torch.uint8), scales, zeros, how)


def stored_blocks(graph: ir.Graph, source: PackedSource, plan: BlockPlan) -> StoredBlocks:
    """Of the weights of `graph` that `plan` puts into blocks those that are taken as they are stored."""
    held: dict[str, StoredGrid] = {}
    taken, others = Counter[str](), Counter[str]()
    for value in graph.initializers.values():
        weight = weight_of(value)
        if not isinstance(weight, Blocks | ExpertBlocks) or weight.piece != "scales":
            continue
        in_blocks = isinstance(weight, Blocks)
        names = weight.rows.names if isinstance(weight, Blocks) else (weight.rows.name,)
        for name in names:
            packing = source.packing(name)
            if packing is None:
                continue
            grid = source.grid(name) if in_blocks else None
            assert value.dtype is not None
            if grid is not None and _fits(grid, plan.of(names), _TYPES[value.dtype]):
                held[name] = grid
                taken[packing] += 1
            else:
                others[packing] += 1
    return StoredBlocks(source, held, tuple(_notes(taken, others, plan.how)))


def _fits(grid: StoredGrid, how: BlockQuantization, scales: torch.dtype) -> bool:
    """Whether blocks hold its codes, zero points and scales: the CPU kernels keep these in float16."""
    if grid.group % how.block_size or not grid.exact_in.issuperset({torch.float16, scales}):
        return False
    if grid.bits == how.bits:
        return not how.is_symmetric or grid.zero == 2 ** (how.bits - 1)
    return grid.bits < how.bits


def _notes(taken: Counter[str], others: Counter[str], how: BlockQuantization) -> list[str]:
    notes = []
    if taken:
        notes.append(f"taken bit for bit, as they are stored: {_said(taken)}")
    if others:
        notes.append(f"dequantized, and quantized again in blocks of {how.block_size}: {_said(others)}")
    return notes


def _said(counts: Counter[str]) -> str:
    return ", ".join(
        f"{count} {'weight' if count == 1 else 'weights'} of {kind}" for kind, count in sorted(counts.items())
    )

"""Stream the planned weights of a graph into one external data file, one tensor at a time."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import SEEK_CUR
from pathlib import Path
from typing import BinaryIO, TypeAlias

import onnx_ir as ir
import torch
from torch import Tensor

from starling.engine.progress import Advance
from starling.export.quantization.blocks import QuantizedRows
from starling.export.quantization.qdq_scheme import FP8, INT4, INT8
from starling.export.weights.weight_plan import (
    Blocks,
    ExpertBlocks,
    ExpertRows,
    QdqRows,
    Rows,
    Table,
    Weight,
    distinct_weights,
    dtype_of,
    planned_bytes,
    shape_of,
    weight_of,
)
from starling.export.weights.weight_source import WeightSource, narrowed

ALIGNMENT = 4096  # a tensor starts on a page, so that a reader can map it
ROW_MULTIPLE = 64  # rows of zeros follow a quantized weight up to such a number: kernels of GPUs ask for it

_TORCH = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.INT8: torch.int8,
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
}
_GRIDS = {grid.stored: grid for grid in (INT8, INT4, FP8)}


#: Offset and length in the file, in bytes.
Place: TypeAlias = tuple[int, int]


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """Size in bytes and SHA-256 of a file, taken while it was written."""

    bytes: int
    sha256: str


class _Writer:
    """Appends tensors, keeps the digest, and reports progress."""

    def __init__(self, out: BinaryIO, total: int, progress: Advance | None) -> None:
        self.out, self.total, self.progress = out, total, progress
        self.digest, self.position, self.done = hashlib.sha256(), 0, 0

    def begin(self) -> int:
        """Pad to the next aligned offset and return it."""
        self.pad(-self.position % ALIGNMENT)
        return self.position

    def pad(self, size: int) -> None:
        """Append so many zero bytes."""
        self._append(bytes(size))

    def write(self, tensor: Tensor) -> None:
        """Append the tensor's bytes; a hole where it has none."""
        if tensor.is_meta:
            self.out.seek(tensor.nbytes, SEEK_CUR)
            self.position += tensor.nbytes
            return
        flat = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        step = 32 * 1024 * 1024
        for start in range(0, flat.size, step):
            piece = flat[start : start + step]
            self._append(piece.data)
            self.done += piece.size
            if self.progress is not None:
                self.progress(self.done, self.total)

    def append(self, tensor: Tensor) -> Place:
        """Write a tensor at an aligned offset."""
        start = self.begin()
        self.write(tensor)
        return start, self.position - start

    def _append(self, data: bytes | memoryview) -> None:
        self.out.write(data)
        self.digest.update(data)
        self.position += len(data)


def write_weights(model: ir.Model, source: WeightSource, file: Path, progress: Advance | None = None) -> WrittenFile:
    """Write every planned weight to `file` and point the graph's initializers at it.

    Memory taken: the largest stored tensor and one chunk. `progress(bytes_done, bytes_total)` is called as it goes.
    Where `source` has shapes alone (on PyTorch's meta device), the file has its size and holes in their place.

    Raises:
        CheckpointError: the checkpoint was cut off or changed since it was opened.
        UnsupportedModelError: a weight is too large for the type it is stored in.
    """
    with file.open("wb") as out:
        writer = _Writer(out, planned_bytes(model), progress)
        places = _write_all(writer, distinct_weights(model), source)
        out.truncate(writer.position)
    for value in model.graph.initializers.values():
        if (planned := weight_of(value)) is not None:
            offset, length = places[planned]
            value.const_value = ir.ExternalTensor(
                file.name,
                offset,
                length,
                dtype_of(value),
                shape=shape_of(value),
                name=str(value.name),
                base_dir=file.parent,
            )
    return WrittenFile(writer.position, writer.digest.hexdigest())


def _write_all(writer: _Writer, distinct: dict[Weight, ir.Value], source: WeightSource) -> dict[Weight, Place]:
    """Write weights in blocks first, then the others in graph order; the place of each."""
    places: dict[Weight, Place] = {}

    def dtype(weight: Weight) -> torch.dtype:
        return _TORCH[dtype_of(distinct[weight])]

    for rows in dict.fromkeys(weight.rows for weight in distinct if isinstance(weight, Blocks)):
        scales = dtype(Blocks(rows, "scales"))
        written = _write_quantized(writer, source.blocks(rows), scales, torch.cat, ROW_MULTIPLE)
        places |= {Blocks(rows, piece): place for piece, place in written.items()}
    for weight, value in distinct.items():
        match weight:
            case QdqRows(rows, "data", block):
                pieces = source.qdq(weight, _GRIDS[dtype_of(value)], dtype(QdqRows(rows, "scales", block)))
                places |= {QdqRows(rows, piece, block): writer.append(tensor) for piece, tensor in pieces.items()}
            case ExpertBlocks(experts, "data"):
                scales = dtype(ExpertBlocks(experts, "scales"))
                written = _write_quantized(writer, source.expert_blocks(experts), scales, torch.stack, 1)
                places |= {ExpertBlocks(experts, piece): place for piece, place in written.items()}
            case ExpertRows():
                start = writer.begin()
                for matrix in source.experts(weight):
                    writer.write(narrowed(matrix, dtype(weight), weight.name))
                places[weight] = start, writer.position - start
            case Rows() | Table():
                places[weight] = writer.append(source.whole(weight, value, dtype(weight)))
    return places


def _write_quantized(
    writer: _Writer,
    quantized: Iterator[tuple[str, QuantizedRows]],
    dtype: torch.dtype,
    join: Callable[[list[Tensor]], Tensor],
    multiple: int,
) -> dict[str, Place]:
    """Write the data as it comes, then the scales and zero points, which are small, joined: the place of each piece.

    Zeros follow each piece, up to so many rows as `multiple` says.
    """
    start, count, row_bytes = writer.begin(), 0, 0
    small: dict[str, list[Tensor]] = {"scales": [], "zero_points": []}
    for name, piece in quantized:
        writer.write(piece.data)
        count, row_bytes = count + len(piece.data), piece.data[0].nbytes
        small["scales"].append(narrowed(piece.scales, dtype, name))
        small["zero_points"].append(piece.zeros)
    missing = -count % multiple
    places = {"data": (start, writer.position - start)}
    writer.pad(missing * row_bytes)
    for piece_name, pieces in small.items():
        places[piece_name] = writer.append(join(pieces))
        writer.pad(missing * pieces[0][0].nbytes)
    return places

"""A GGUF file: its metadata, and its tensors row range by row range.

The file is read with plain reads, never mapped, so that no page of it stays in this process; and the header is parsed
here, because `gguf.GGUFReader` makes several array objects of every vocabulary entry (seconds, and 300 MB).
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from starling.engine.errors import CheckpointError, UnsupportedModelError
from starling.export.checkpoints.checkpoint import FILES

if TYPE_CHECKING:
    import torch

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
VERSIONS = (2, 3)
#: A vocabulary of 262,144 tokens with its merges takes 17 MB.
MOST_HEADER_BYTES = 128 * 2**20
# Types that hold values rather than blocks, and need no dequantizing; torch's names for them.
PLAIN_TYPES = {
    GGMLQuantizationType.F32: "float32",
    GGMLQuantizationType.F16: "float16",
    GGMLQuantizationType.BF16: "bfloat16",
}
#: Blocks that begin with their scale (float16) and hold whole numbers of so many bits, with zero in the middle.
INTEGER_BITS = {
    GGMLQuantizationType.Q4_0: 4,
    GGMLQuantizationType.Q5_0: 5,
    GGMLQuantizationType.Q8_0: 8,
    GGMLQuantizationType.IQ4_NL: 8,
}
_SCALE_BYTES = 2


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies. `shape` is in torch's order, `offset` is in bytes from the start of the file `path`."""

    path: Path
    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that `GgufFile.rows` gives: the stored one, or float32 for quantized blocks."""
        import torch

        named: torch.dtype = getattr(torch, PLAIN_TYPES.get(self.kind, "float32"))
        return named

    @property
    def row_bytes(self) -> int:
        """Bytes of one step along the first axis."""
        values, size = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape[1:]) * size // values


@dataclass(frozen=True, slots=True)
class GgufFile:
    """An opened GGUF file. `metadata` has numbers, booleans, strings and lists under llama.cpp's own keys.

    Of a file in parts `path` and `metadata` are those of the first part, `tensors` those of all.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def rows(self, name: str, index: np.ndarray[Any, np.dtype[np.int64]]) -> torch.Tensor:
        """The rows `index` of a tensor [len(index), ...], dequantized, a copy.

        Raises CheckpointError where the file has shrunk since it was opened.
        """
        tensor = self.tensors[name]
        if not index.size:
            import torch

            return torch.empty((0, *tensor.shape[1:]), dtype=tensor.dtype)
        return _values(self._stored(tensor, index), tensor).reshape(len(index), *tensor.shape[1:])

    def integers(self, name: str, index: np.ndarray[Any, np.dtype[np.int64]]) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows `index`, some, of a matrix in blocks of INTEGER_BITS.

        Whole numbers int16 [n, columns], below 0 too, and their scales float32 [n, blocks].
        """
        import torch

        tensor = self.tensors[name]
        block_bytes = GGML_QUANT_SIZES[tensor.kind][1]
        blocks = self._stored(tensor, index).reshape(len(index), -1, block_bytes)
        scales = blocks[:, :, :_SCALE_BYTES].copy().view(np.float16)[:, :, 0].astype(np.float32)
        blocks = blocks.copy()
        blocks[:, :, :_SCALE_BYTES] = np.array([1], dtype=np.float16).view(np.uint8)
        whole = dequantize(blocks.reshape(len(index), -1), tensor.kind)
        return torch.from_numpy(whole).to(torch.int16), torch.from_numpy(scales)

    def _stored(
        self, tensor: GgufTensor, index: np.ndarray[Any, np.dtype[np.int64]]
    ) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The bytes of some rows [len(index), row_bytes]."""
        low, high = int(index.min()), int(index.max()) + 1
        with tensor.path.open("rb") as file:
            file.seek(tensor.offset + low * tensor.row_bytes)
            raw = np.fromfile(file, dtype=np.uint8, count=(high - low) * tensor.row_bytes)
        if raw.size != (high - low) * tensor.row_bytes:
            raise CheckpointError(
                f"{tensor.path} was cut off while it was read, at tensor {tensor.name}: get the file again"
            )
        raw = raw.reshape(high - low, tensor.row_bytes)
        picked = index - low
        if not np.array_equal(picked, np.arange(high - low)):
            raw = raw[picked]
        return raw


def _values(raw: np.ndarray[Any, np.dtype[np.uint8]], tensor: GgufTensor) -> torch.Tensor:
    import torch

    if tensor.kind in PLAIN_TYPES:
        return torch.from_numpy(raw).view(tensor.dtype)
    return torch.from_numpy(dequantize(raw, tensor.kind))


def read_gguf(path: Path) -> GgufFile:
    """Parse the header of one file and check that every tensor lies within it; `open_gguf` joins a file in parts.

    Raises CheckpointError where the file is missing, no GGUF file, of an unknown version, truncated, or altered.
    """
    FILES.check_regular(path)
    try:
        with path.open("rb") as file:
            header = _Header(file, path, path.stat().st_size)
            tensor_count, metadata = header.metadata()
            tensors = header.tensors(tensor_count, max(1, int(metadata.get("general.alignment", 32))))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (struct.error, ValueError, TypeError, KeyError, OverflowError, MemoryError, RecursionError) as error:
        raise CheckpointError(f"{path} is truncated or no GGUF file ({error}): get the file again") from error
    for tensor in tensors.values():
        _check_tensor(path, tensor, header.size)
    for kind in {tensor.kind for tensor in tensors.values()}:
        _check_readable(path, kind)
    return GgufFile(path, metadata, tensors)


def _check_tensor(path: Path, tensor: GgufTensor, file_size: int) -> None:
    values, block_bytes = GGML_QUANT_SIZES[tensor.kind]
    if not tensor.shape or tensor.shape[-1] % values or (values > 1 and len(tensor.shape) < 2):
        raise CheckpointError(
            f"{path}: tensor {tensor.name} of shape {tensor.shape} cannot hold {tensor.kind.name} blocks"
        )
    end = tensor.offset + math.prod(tensor.shape) // values * block_bytes
    if end > file_size:
        raise CheckpointError(
            f"{path} is truncated: tensor {tensor.name} ends at byte {end}, the file has {file_size}: get it again"
        )


def _check_readable(path: Path, kind: GGMLQuantizationType) -> None:
    try:
        if kind not in PLAIN_TYPES:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError as error:
        raise UnsupportedModelError(
            f"{path} has {kind.name} tensors, which cannot be dequantized: use a file of another quantization"
        ) from error


class _Header:
    """Reads the header from front to back; every short read raises struct.error or ValueError."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self.file = file
        self.path = path
        self.size = size

    def metadata(self) -> tuple[int, dict[str, Any]]:
        magic, version, tensor_count, pairs = self.unpack("<4sIQQ")
        if magic != b"GGUF":
            raise ValueError(f"it starts with {magic!r}, not b'GGUF'")
        if version not in VERSIONS:
            raise ValueError(f"GGUF version {version}, of which only {' and '.join(map(str, VERSIONS))} are known")
        metadata = {}
        for _ in range(pairs):
            key = self.string()
            metadata[key] = self.value(self.unpack("<I")[0])
        return tensor_count, metadata

    def tensors(self, count: int, alignment: int) -> dict[str, GgufTensor]:
        found = []
        for _ in range(count):
            name = self.string()
            dimensions = self.unpack(f"<{self.unpack('<I')[0]}Q")
            kind, offset = self.unpack("<IQ")
            # ggml writes the fastest-moving dimension first, torch the slowest.
            found.append((name, tuple(reversed(dimensions)), GGMLQuantizationType(kind), offset))
        start = -(-self.file.tell() // alignment) * alignment
        return {name: GgufTensor(self.path, name, shape, kind, start + offset) for name, shape, kind, offset in found}

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.unpack(SCALARS[kind])[0]
        element, count = self.unpack("<IQ")
        if element in SCALARS:
            return list(self.unpack(f"<{count}{SCALARS[element][1]}"))
        return [self.value(element) for _ in range(count)]

    def string(self) -> str:
        (length,) = self.unpack("<Q")
        return self.take(length).decode("utf-8")

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def take(self, count: int) -> bytes:
        begin = self.file.tell()
        # Checked before the read: an altered length could ask for terabytes, and a sparse file has them.
        if count > self.size - begin:
            raise ValueError(f"the header wants {count} bytes more where {self.size - begin} are left")
        if begin + count > MOST_HEADER_BYTES:
            raise ValueError(f"the header has more than {MOST_HEADER_BYTES:,} bytes")
        return self.file.read(count)

"""The kernels' compile-time parameters, and how each is launched."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

STORE, ADD_RESIDUAL, GATED = 0, 1, 2
#: By what a bundle says stands around a product.
EPILOGUES = {"none": STORE, "residual": ADD_RESIDUAL, "gated": GATED}
_POINTERS = ("out", "x", "data", "scales", "norm", "residual")


class LinearArguments(ctypes.Structure):
    """As in linear.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("rows", ctypes.c_int),
        ("n", ctypes.c_int),
        ("epsilon", ctypes.c_float),
    ]


@dataclass(frozen=True, slots=True)
class Linear:
    """One compilation of linear.cu. `persistent`: blocks of a multiprocessor that take the tiles in turn; 0: a block
    for each tile."""

    k: int
    bits: int
    rows: int = 1
    norm: bool = False
    epilogue: int = STORE
    row_tiles: int = 1
    warps: int = 8
    unroll: int = 4
    depth: int = 2
    min_blocks: int = 1
    persistent: int = 0

    @property
    def column_tiles(self) -> int:
        return -(-self.rows // (4 if self.bits == 8 else 8))

    @property
    def threads(self) -> int:
        return self.warps * 32

    @property
    def is_valid(self) -> bool:
        step = self.unroll * 512 // self.bits
        fits = self.k % step == 0 and self.k // step >= self.warps
        gated = self.epilogue != GATED or self.row_tiles % 2 == 0
        return fits and gated and self.shared_bytes <= 227 << 10

    @property
    def shared_bytes(self) -> int:
        sums = self.row_tiles * self.column_tiles * (2 if self.bits == 8 else 4)
        return 2 * self.warps * sums * 32 * 4 + (self.rows * (self.k + 32) * 2 if self.norm else 0)

    def defines(self) -> dict[str, int]:
        return {
            "LINEAR_K": self.k,
            "LINEAR_BITS": self.bits,
            "LINEAR_COLUMN_TILES": self.column_tiles,
            "LINEAR_ROW_TILES": self.row_tiles,
            "LINEAR_WARPS": self.warps,
            "LINEAR_UNROLL": self.unroll,
            "LINEAR_DEPTH": self.depth,
            "LINEAR_NORM": int(self.norm),
            "LINEAR_EPILOGUE": self.epilogue,
            "LINEAR_MIN_BLOCKS": self.min_blocks,
        }

    def grid(self, n: int, multiprocessors: int) -> tuple[int, int, int]:
        rows = (self.row_tiles // 2 if self.epilogue == GATED else self.row_tiles) * 16
        tiles = -(-(n // 2 if self.epilogue == GATED else n) // rows)
        return (min(tiles, self.persistent * multiprocessors) if self.persistent else tiles, 1, 1)


class NormArguments(ctypes.Structure):
    """As in norm.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("out", "x", "weight")),
        ("width", ctypes.c_int),
        ("epsilon", ctypes.c_float),
    ]


class SamplingArguments(ctypes.Structure):
    """As in sampling.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("logits", "temperature", "top_k", "top_p", "min_p", "noise")),
        *((name, ctypes.c_void_p) for name in ("lengths", "tokens")),
        ("vocabulary", ctypes.c_int),
        ("positions", ctypes.c_int),
    ]


@dataclass(frozen=True, slots=True)
class Sampling:
    """One compilation of sampling.cu, for logits of float16 or bfloat16. `threads`: a power of two."""

    bfloat16: bool
    threads: int = 1024

    @property
    def shared_bytes(self) -> int:
        return 256 * 8 * 2 * 4 + 256 * 8 + self.threads * 8 + 16

    def defines(self) -> dict[str, int]:
        return {"SAMPLING_BFLOAT16": int(self.bfloat16), "SAMPLING_THREADS": self.threads}


class AttentionArguments(ctypes.Structure):
    """As in attention.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("out", "qkv", "keys", "values", "cosines", "sines")),
        *((name, ctypes.c_void_p) for name in ("lengths", "parts", "counters")),
        ("max_positions", ctypes.c_int),
        ("window", ctypes.c_int),
        ("scale", ctypes.c_float),
    ]


@dataclass(frozen=True, slots=True)
class Attention:
    """One compilation of attention.cu, and `splits`, the most blocks that share the positions of a head."""

    group: int
    warps: int = 4
    early: bool = True
    splits: int = 32

    @property
    def threads(self) -> int:
        return self.warps * 32

    @property
    def shared_bytes(self) -> int:
        of_warp = 16 * 8 + 8 + self.group * 130
        return 10 * 128 * 2 + self.warps * of_warp * 4 + 16

    def defines(self) -> dict[str, int]:
        names = ("ATTENTION_GROUP", "ATTENTION_WARPS", "ATTENTION_EARLY")
        return dict(zip(names, (self.group, self.warps, int(self.early)), strict=True))

    def parts(self, rows: int, kv_heads: int) -> int:
        """Floats of scratch."""
        return rows * kv_heads * self.splits * self.group * 130

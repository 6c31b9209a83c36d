"""The operators of a session on CUDA: their kernels, scratch memory and CUDA's own functions, for cuda_linear.cpp."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from starling.engine.kernels import require_kernel_library
from starling.engine.kernels.cuda.compiler import FOLDER, cached_cubin
from starling.engine.kernels.cuda.driver import Kernel, driver
from starling.engine.kernels.cuda.variants import GATED, Linear

#: A kernel serves so many rows and fewer; beyond the last the weights are dequantized for cuBLAS.
ROWS = (1, 4, 8, 16)
#: Up to so many rows each block normalizes its input itself.
MOST_NORMED_ROWS = 4
#: What a block of dequantized weights may take, so that the product after it finds them in the card's cache.
WEIGHTS_BYTES = 32 << 20
#: The variant of linear.cu that was fastest on a card, {"sm90": {"k,n,rows,epilogue": {...}}}: by profiling on an H200.
MEASURED = FOLDER / "measured.json"
#: Another such file, while the next card is measured.
VARIANTS = "STARLING_CUDA_VARIANTS"
_CUBLAS = ("libcublas.so.13", "libcublas.so.12")
_DENSE_THREADS, _NORM_THREADS, _NORM_SHARED = 256, 512, 64


class Product(NamedTuple):
    """[n, k] int8 weights, and what stands around their product."""

    k: int
    n: int
    norm: bool
    epilogue: int


class _CudaKernel(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("k", "n", "norm", "epilogue", "rows")),
        *((name, ctypes.c_uint32) for name in ("grid", "threads", "shared")),
        ("function", ctypes.c_void_p),
    ]


class _CudaFunction(ctypes.Structure):
    _fields_ = [("function", ctypes.c_void_p), ("threads", ctypes.c_uint32), ("shared", ctypes.c_uint32)]


class _CudaSession(ctypes.Structure):
    """As in cuda_linear.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("launch", "copy", "multiply", "blas", "stream", "weights")),
        ("weights_bytes", ctypes.c_size_t),
        ("activations", ctypes.c_void_p),
        ("activations_bytes", ctypes.c_size_t),
        *((name, _CudaFunction) for name in ("dequantize", "rms_norm", "gate")),
        ("kernels", ctypes.POINTER(_CudaKernel)),
        ("count", ctypes.c_int32),
        ("early", ctypes.c_int32),
    ]


class CudaOperators:
    """Kernels for `products`, compiled for the card at first use and kept in `cache`."""

    def __init__(
        self,
        products: Iterable[Product],
        *,
        target: str,
        multiprocessors: int,
        stream: int,
        allocate: Callable[[int], int],
        prefill_chunk: int,
        cache: Path,
    ) -> None:
        """`target`: compute capability, as "sm90"; `allocate` gives device memory, which its owner frees.

        Raises KernelsUnavailable, CompilationError or DriverError.
        """
        self._library = ctypes.CDLL(str(require_kernel_library().path))
        wanted = list(dict.fromkeys(products))
        measured = measured_variants(target)
        chosen = {(product, count): variant(product, count, measured) for product in wanted for count in ROWS}
        architecture = f"sm_{target.removeprefix('sm')}"
        codes = _compile({each for each in chosen.values()}, architecture, cache)
        self._kernels = {
            each: Kernel(codes[each], "linear", each.shared_bytes) for each in dict.fromkeys(chosen.values())
        }
        table = [
            _CudaKernel(
                product.k,
                product.n,
                each.norm,
                product.epilogue,
                count,
                each.grid(product.n, multiprocessors)[0],
                each.threads,
                each.shared_bytes,
                self._kernels[each].handle,
            )
            for (product, count), each in chosen.items()
        ]
        self._table = (_CudaKernel * len(table))(*table)
        dense, norm = (cached_cubin(source, {}, architecture, cache) for source in ("dense.cu", "norm.cu"))
        self._dense = [Kernel(dense, "dequantize", 0), Kernel(norm, "rms_norm", _NORM_SHARED), Kernel(dense, "gate", 0)]
        widest = max((product.k + (product.n if product.epilogue == GATED else 0) for product in wanted), default=0)
        activations = 2 * max(prefill_chunk, ROWS[-1]) * widest
        blas = _Blas(stream)
        self._session = _CudaSession(
            launch=_address(driver().cuLaunchKernelEx),
            copy=_address(driver().cuMemcpyDtoDAsync_v2),
            multiply=_address(blas.functions.cublasGemmEx),
            blas=blas.handle,
            stream=stream,
            weights=allocate(WEIGHTS_BYTES),
            weights_bytes=WEIGHTS_BYTES,
            activations=allocate(activations),
            activations_bytes=activations,
            dequantize=_CudaFunction(self._dense[0].handle, _DENSE_THREADS, 0),
            rms_norm=_CudaFunction(self._dense[1].handle, _NORM_THREADS, _NORM_SHARED),
            gate=_CudaFunction(self._dense[2].handle, _DENSE_THREADS, 0),
            kernels=self._table,
            count=len(table),
            early=int(int(target.removeprefix("sm")) >= 90),
        )
        self._blas = blas

    def register(self, options: object) -> None:
        """Have the session that is made next, with these options, run its operators here."""
        self._library.starling_next_session_on_cuda(ctypes.byref(self._session))
        options.register_custom_ops_library(str(require_kernel_library().path))  # type: ignore[attr-defined]

    def close(self) -> None:
        """Unload the kernels, once no session has them."""
        self._blas.close()
        for kernel in (*self._kernels.values(), *self._dense):
            kernel.close()


def variant(product: Product, rows: int, measured: Mapping[str, dict[str, int]]) -> Linear:
    """The parameters of linear.cu for a product of up to `rows` rows: those measured, else ones that fit."""
    norm = product.norm and rows <= MOST_NORMED_ROWS
    known: dict[str, Any] = measured.get(f"{product.k},{product.n},{rows},{product.epilogue}", {})
    gated = product.epilogue == GATED
    tried: list[dict[str, Any]] = [
        *([known] if known else []),
        *({"warps": warps, "unroll": unroll, "depth": 2 if unroll < 8 else 1, "row_tiles": 2 if gated else 1}
          for unroll in ((4, 2, 1) if not gated else (2, 1)) for warps in (8, 4, 2, 1)),
    ]  # fmt: skip
    plain = Linear(product.k, 8, rows, norm, product.epilogue)
    return next(each for changes in tried if (each := replace(plain, **changes)).is_valid)


def is_measured(target: str) -> bool:
    """Whether such a card has shown that the kernels are right and faster than ONNX Runtime's."""
    return bool(measured_variants(target))


def measured_variants(target: str) -> dict[str, dict[str, int]]:
    """The parameters that were fastest on such a card, by "k,n,rows,epilogue"; none where it was not measured."""
    tables = json.loads(Path(os.environ.get(VARIANTS) or MEASURED).read_text(encoding="utf-8"))
    return dict(tables.get(target, {}))


def _compile(variants: set[Linear], architecture: str, cache: Path) -> dict[Linear, bytes]:
    def one(each: Linear) -> tuple[Linear, bytes]:
        return each, cached_cubin("linear.cu", each.defines(), architecture, cache)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # NVRTC takes a second or two for each, without Python's lock
        return dict(pool.map(one, variants))


class _Blas:
    """A cuBLAS handle on a stream."""

    def __init__(self, stream: int) -> None:
        self.functions = _load(_CUBLAS)
        handle = ctypes.c_void_p()
        if status := self.functions.cublasCreate_v2(ctypes.byref(handle)):
            raise OSError(f"cublasCreate: error {status}")
        self.handle = handle.value
        self.functions.cublasSetStream_v2(handle, ctypes.c_void_p(stream))

    def close(self) -> None:
        self.functions.cublasDestroy_v2(ctypes.c_void_p(self.handle))


def _load(names: tuple[str, ...]) -> ctypes.CDLL:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise OSError(f"none of {', '.join(names)} is to be found")


def _address(function: object) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type]

"""Where bundles run: on the card, or on ONNX Runtime's CPU provider, which shows that the kit itself works."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from starling.engine.backends.cuda.cuda_device import address_of
from starling.engine.bundle.manifest import Bundle

_NAN_BYTE = 0xFF  # NaN in either type of 16 bits when it is repeated


class Machine(Protocol):
    """A card or its stand-in."""

    #: Where PyTorch computes.
    torch_device: str
    is_card: bool

    def why_not(self, bundle: Bundle) -> str | None:
        """Why it cannot run the bundle."""
        ...

    def open(
        self,
        bundle: Bundle,
        *,
        rows: int,
        positions: int,
        chunk: int | None = None,
        capture: bool = True,
        kernels: bool = False,
        settings: Mapping[str, str] | None = None,
    ) -> Any:
        """A backend; `settings` replace some of the session's."""
        ...

    def fill_cache_with_nan(self, backend: Any, rows: int) -> None:
        """As memory may be that another program has used before."""
        ...

    def memory_in_use(self) -> int:
        """Bytes of the device's memory, by any program."""
        ...


class CudaMachine:
    """The first GPU."""

    torch_device, is_card = "cuda", True

    def why_not(self, bundle: Bundle) -> str | None:
        return None

    def open(
        self,
        bundle: Bundle,
        *,
        rows: int,
        positions: int,
        chunk: int | None = None,
        capture: bool = True,
        kernels: bool = False,
        settings: Mapping[str, str] | None = None,
    ) -> Any:
        from starling.engine.backends.onnxruntime.cpu_session import import_onnxruntime
        from starling.engine.backends.onnxruntime.onnxruntime_cuda import open_cuda

        return open_cuda(
            import_onnxruntime(),
            bundle,
            max_seq=positions,
            max_batch=rows,
            prefill_chunk=chunk,
            capture=capture,
            kernels=kernels,
            settings=settings,
        )

    def fill_cache_with_nan(self, backend: Any, rows: int) -> None:
        memory = backend._memory
        parts = [part for row in range(rows) for part in backend._cache.parts(row)]
        source = memory.host((max(size for _, size in parts),), np.uint8)
        source[:] = _NAN_BYTE
        for address, size in parts:
            memory.copy(address, address_of(source), size)
        memory.synchronize()

    def memory_in_use(self) -> int:
        import torch

        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return total - free


class CpuMachine:
    """For a dry run: no CUDA graphs, no step launched before the last one is read, no kernels."""

    torch_device, is_card = "cpu", False

    def why_not(self, bundle: Bundle) -> str | None:
        return "a CPU runs bfloat16 with our kernels alone, and here without" if bundle.dtype == "bf16" else None

    def open(
        self,
        bundle: Bundle,
        *,
        rows: int,
        positions: int,
        chunk: int | None = None,
        capture: bool = True,
        kernels: bool = False,
        settings: Mapping[str, str] | None = None,
    ) -> Any:
        from starling.engine.backends.open_backend import open_backend

        return open_backend(
            bundle, name="onnxruntime-cpu", max_seq=positions, max_batch=rows, prefill_chunk=chunk, threads=1
        )

    def fill_cache_with_nan(self, backend: Any, rows: int) -> None:
        pass

    def memory_in_use(self) -> int:
        return 0

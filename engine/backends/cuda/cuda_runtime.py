"""CUDA's runtime library by ctypes, with the calls and results of cuda-bindings: (error, result) each.

ONNX Runtime's CUDA provider has loaded the library anyway, so nothing more is to be installed.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any, ClassVar

from starling.engine.errors import BackendError
from starling.engine.installation import install_command

#: libcudart's names, the newest first.
SONAMES = ("libcudart.so.13", "libcudart.so.12")
_PROPERTIES_BYTES = 4096  # cudaDeviceProp takes about 1 KiB; the name is its first member
_POINTER, _SIZE, _INT, _UNSIGNED = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_uint


class CudaRuntime:
    """What `starling.engine.backends.cuda.cuda_device.CudaDevice` calls, under CUDA's own names."""

    cudaHostAllocDefault = 0
    cudaStreamNonBlocking = 1
    cudaEventDisableTiming = 2
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyDefault=4)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaDeviceAttr = SimpleNamespace(
        cudaDevAttrMultiProcessorCount=16, cudaDevAttrComputeCapabilityMajor=75, cudaDevAttrComputeCapabilityMinor=76
    )
    _ARGUMENTS: ClassVar[dict[str, tuple[Any, ...]]] = {
        "cudaFree": (_POINTER,),
        "cudaFreeHost": (_POINTER,),
        "cudaStreamDestroy": (_POINTER,),
        "cudaStreamSynchronize": (_POINTER,),
        "cudaMemcpyAsync": (_POINTER, _POINTER, _SIZE, _INT, _POINTER),
        "cudaMemsetAsync": (_POINTER, _INT, _SIZE, _POINTER),
        "cudaEventDestroy": (_POINTER,),
        "cudaEventRecord": (_POINTER, _POINTER),
        "cudaEventSynchronize": (_POINTER,),
        "cudaStreamBeginCapture": (_POINTER, _INT),
        "cudaGraphDestroy": (_POINTER,),
        "cudaGraphLaunch": (_POINTER, _POINTER),
        "cudaGraphExecDestroy": (_POINTER,),
    }

    def __init__(self) -> None:
        """Raises BackendError where there is no libcudart."""
        self._library = _load()
        for name, arguments in self._ARGUMENTS.items():
            setattr(self, name, self._plain(name, arguments))
        self._library.cudaGetErrorString.restype = ctypes.c_char_p

    def _plain(self, name: str, arguments: tuple[Any, ...]) -> Any:
        function = getattr(self._library, name)
        function.argtypes = arguments
        return lambda *given: (function(*given),)

    def _made(self, name: str, arguments: tuple[Any, ...], *given: int) -> tuple[int, int]:
        """A function that writes an address or a handle to its first argument."""
        made = _POINTER()
        function = getattr(self._library, name)
        function.argtypes = (ctypes.POINTER(_POINTER), *arguments)
        return function(ctypes.byref(made), *given), made.value or 0

    def cudaMalloc(self, size: int) -> tuple[int, int]:
        return self._made("cudaMalloc", (_SIZE,), size)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[int, int]:
        return self._made("cudaHostAlloc", (_SIZE, _UNSIGNED), size, flags)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:
        return self._made("cudaStreamCreateWithFlags", (_UNSIGNED,), flags)

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[int, int]:
        return self._made("cudaEventCreateWithFlags", (_UNSIGNED,), flags)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, int]:
        graph = _POINTER()
        self._library.cudaStreamEndCapture.argtypes = (_POINTER, ctypes.POINTER(_POINTER))
        return self._library.cudaStreamEndCapture(stream, ctypes.byref(graph)), graph.value or 0

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[int, int]:
        return self._made("cudaGraphInstantiate", (_POINTER, ctypes.c_ulonglong), graph, flags)

    def cudaDeviceGetAttribute(self, attribute: int, device: int) -> tuple[int, int]:
        value = _INT()
        return self._library.cudaDeviceGetAttribute(ctypes.byref(value), attribute, device), value.value

    def cudaGetDeviceProperties(self, device: int) -> tuple[int, Any]:
        properties = ctypes.create_string_buffer(_PROPERTIES_BYTES)
        error = self._library.cudaGetDeviceProperties(properties, device)
        return error, SimpleNamespace(name=properties.value)

    def cudaMemGetInfo(self) -> tuple[int, int, int]:
        free, total = _SIZE(), _SIZE()
        error = self._library.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
        return error, free.value, total.value

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:
        return 0, self._library.cudaGetErrorString(error)


def _load() -> ctypes.CDLL:
    for name in SONAMES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise BackendError(f"none of {', '.join(SONAMES)} is to be found: {install_command('gpu')}")

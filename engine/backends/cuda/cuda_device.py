"""The GPU as the TensorRT backend uses it: memory, one stream's work, events, graphs. Addresses and handles are ints.

`CudaDevice` has not been run on hardware yet.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from starling.engine.errors import BackendError
from starling.engine.installation import install_command

HostArray = npt.NDArray[Any]

#: CUDA's own guarantee for an allocation, and what TensorRT asks of a tensor's address, in bytes.
ALIGNMENT = 256
_NO_DRIVER, _NO_DEVICE, _OUT_OF_MEMORY = 35, 100, 2


class Device(Protocol):
    """One GPU. Work on a stream runs in order and later; `synchronize` and `wait` are what the host waits with.

    Every method raises BackendError where the device refuses.
    """

    name: str
    #: Compute capability as plans name it, for example "sm89".
    target: str
    multiprocessors: int

    def allocate(self, size: int) -> int:
        """Address of `size` bytes of device memory, aligned to ALIGNMENT; what they hold is not defined."""
        ...

    def free(self, address: int) -> None: ...

    def host_array(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> HostArray:
        """A zeroed array in page-locked host memory, which copies from and to the device run beside the host."""
        ...

    def free_host(self, array: HostArray) -> None: ...

    def create_stream(self) -> int: ...

    def destroy_stream(self, stream: int) -> None: ...

    def copy(self, destination: int, source: int, size: int, stream: int) -> None:
        """Copy `size` bytes on the stream, between any two of page-locked host memory and device memory."""
        ...

    def zero(self, address: int, size: int, stream: int) -> None: ...

    def synchronize(self, stream: int) -> None:
        """Wait until everything on the stream is done."""
        ...

    def create_event(self) -> int: ...

    def destroy_event(self, event: int) -> None: ...

    def record(self, event: int, stream: int) -> None:
        """The event happens when everything that is on the stream now is done."""
        ...

    def wait(self, event: int) -> None:
        """Wait until the event has happened."""
        ...

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        """A graph of what `work` puts on the stream; nothing of it runs now."""
        ...

    def launch(self, graph: int, stream: int) -> None: ...

    def destroy_graph(self, graph: int) -> None: ...


def address_of(array: HostArray) -> int:
    """Address of the first element of a page-locked array."""
    return array.ctypes.data


def host_view(address: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> HostArray:
    """Host memory at `address`, owned by somebody else, as an array."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory: Any = (ctypes.c_byte * size).from_address(address)
    array: HostArray = np.frombuffer(memory, dtype=dtype).reshape(shape)
    return array


class CudaDevice:
    """A `Device` by CUDA's runtime. CUDA_VISIBLE_DEVICES chooses which GPU is the first one."""

    def __init__(self, cuda: Any = None) -> None:
        """`cuda` has the calls of cuda-bindings, which it is by default.

        Raises BackendError without it, without a driver and without a GPU.
        """
        self._cuda = _import_cuda() if cuda is None else cuda
        self._capture_mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        # The direction of a copy follows from the two addresses.
        self._any_direction = self._cuda.cudaMemcpyKind.cudaMemcpyDefault
        major, minor = self._attribute("ComputeCapabilityMajor"), self._attribute("ComputeCapabilityMinor")
        self.target = f"sm{major}{minor}"
        self.multiprocessors = self._attribute("MultiProcessorCount")
        self.name = self._call("cudaGetDeviceProperties", 0).name.decode()

    def allocate(self, size: int) -> int:
        return int(self._call("cudaMalloc", size))

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def host_array(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> HostArray:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        address = int(self._call("cudaHostAlloc", max(size, 1), self._cuda.cudaHostAllocDefault))
        ctypes.memset(address, 0, size)
        return host_view(address, shape, dtype)

    def free_host(self, array: HostArray) -> None:
        self._call("cudaFreeHost", address_of(array))

    def create_stream(self) -> int:
        # Non-blocking: work on CUDA's default stream by others in the process does not order ours.
        return int(self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking))

    def destroy_stream(self, stream: int) -> None:
        self._call("cudaStreamDestroy", stream)

    def copy(self, destination: int, source: int, size: int, stream: int) -> None:
        self._call("cudaMemcpyAsync", destination, source, size, self._any_direction, stream)

    def zero(self, address: int, size: int, stream: int) -> None:
        self._call("cudaMemsetAsync", address, 0, size, stream)

    def synchronize(self, stream: int) -> None:
        self._call("cudaStreamSynchronize", stream)

    def create_event(self) -> int:
        return int(self._call("cudaEventCreateWithFlags", self._cuda.cudaEventDisableTiming))

    def destroy_event(self, event: int) -> None:
        self._call("cudaEventDestroy", event)

    def record(self, event: int, stream: int) -> None:
        self._call("cudaEventRecord", event, stream)

    def wait(self, event: int) -> None:
        self._call("cudaEventSynchronize", event)

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        # Thread-local: what other threads of the process ask of CUDA meanwhile does not break the capture.
        self._call("cudaStreamBeginCapture", stream, self._capture_mode)
        try:
            work()
        except BaseException:
            self._cuda.cudaStreamEndCapture(stream)  # the first error is the one to report
            raise
        graph = self._call("cudaStreamEndCapture", stream)
        executable = self._call("cudaGraphInstantiate", graph, 0)
        self._call("cudaGraphDestroy", graph)
        return int(executable)

    def launch(self, graph: int, stream: int) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        self._call("cudaGraphExecDestroy", graph)

    def _attribute(self, name: str) -> int:
        attribute = getattr(self._cuda.cudaDeviceAttr, f"cudaDevAttr{name}")
        return int(self._call("cudaDeviceGetAttribute", attribute, 0))

    def _call(self, function: str, *arguments: Any) -> Any:
        """What the CUDA function returns beside its error code, or None."""
        error, *results = getattr(self._cuda, function)(*arguments)
        if error:
            raise BackendError(self._message(function, error))
        return results[0] if results else None

    def _message(self, function: str, error: Any) -> str:
        text = f"CUDA error {int(error)}: {self._cuda.cudaGetErrorString(error)[1].decode()}"
        if int(error) in (_NO_DRIVER, _NO_DEVICE):
            return f"no usable NVIDIA GPU here ({text}); install its driver, or use --backend onnxruntime-cpu"
        if int(error) == _OUT_OF_MEMORY:
            _, free, total = self._cuda.cudaMemGetInfo()
            room = f"{(free or 0) / 2**30:.1f} of {(total or 0) / 2**30:.1f} GiB are free"
            return f"no room in the GPU's memory ({text}; {room}); lower --max-seq or --max-batch"
        return f"{function} failed on the GPU ({text})"


def _import_cuda() -> Any:
    try:
        return import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise BackendError(
            f"cuda-bindings is not installed ({error}): {install_command('tensorrt-rtx')} or "
            f"{install_command('tensorrt')}"
        ) from error

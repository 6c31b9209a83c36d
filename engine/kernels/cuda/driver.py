"""Kernels on the card by the driver's own library: load, configure, launch on a stream (also one that is captured)."""

from __future__ import annotations

import ctypes
from functools import cache

_MAX_DYNAMIC_SHARED, _REGISTERS, _LOCAL_BYTES = 8, 4, 3  # CUfunction_attribute
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID


class DriverError(Exception):
    """A call to the CUDA driver failed; the message names the call and the driver's own words."""


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60)]


class _Configuration(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


class Kernel:
    """One kernel of a cubin. It takes a single structure by value."""

    def __init__(self, code: bytes, name: str, shared_bytes: int) -> None:
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._shared = shared_bytes
        _call("cuModuleLoadData", ctypes.byref(self._module), code)
        _call("cuModuleGetFunction", ctypes.byref(self._function), self._module, name.encode())
        if shared_bytes > 48 << 10:
            _call("cuFuncSetAttribute", self._function, _MAX_DYNAMIC_SHARED, shared_bytes)

    def launch(
        self, grid: tuple[int, int, int], threads: int, arguments: ctypes.Structure, stream: int, *, early: bool
    ) -> None:
        """`early`: it may start before the kernel before it is over (compute capability 9.0 and up)."""
        attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1)
        configuration = _Configuration(
            *grid, threads, 1, 1, self._shared, stream, ctypes.pointer(attribute), int(early)
        )
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        _call("cuLaunchKernelEx", ctypes.byref(configuration), self._function, parameters, None)

    @property
    def handle(self) -> int | None:
        """The CUfunction."""
        return self._function.value

    def close(self) -> None:
        """Unload its code."""
        _call("cuModuleUnload", self._module)

    def blocks_of_a_multiprocessor(self, threads: int) -> int:
        count = ctypes.c_int()
        name = "cuOccupancyMaxActiveBlocksPerMultiprocessor"
        _call(name, ctypes.byref(count), self._function, threads, ctypes.c_size_t(self._shared))
        return count.value

    def registers(self) -> tuple[int, int]:
        """Registers a thread, and bytes of local memory (spills)."""
        values = []
        for attribute in (_REGISTERS, _LOCAL_BYTES):
            value = ctypes.c_int()
            _call("cuFuncGetAttribute", ctypes.byref(value), attribute, self._function)
            values.append(value.value)
        return values[0], values[1]


@cache
def driver() -> ctypes.CDLL:
    """The driver's library."""
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: object) -> None:
    status = getattr(driver(), name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(status, ctypes.byref(text))
        raise DriverError(f"{name}: {(text.value or b'').decode()} ({status})")

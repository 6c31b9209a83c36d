"""CPU kernels: operators for ONNX Runtime in a C++ library that is built when the package is installed.

Where it is missing (no compiler, another processor, another system) the engine runs the bundle's plain graph with ONNX
Runtime's own operators: the same results within rounding. `STARLING_CPU_KERNELS=0` does so everywhere;
`STARLING_CPU_ISA=avx2` or `avx-vnni` takes what a processor without AVX-512 would.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from starling.engine.installation import install_command

SWITCH = "STARLING_CPU_KERNELS"


@dataclass(frozen=True, slots=True)
class KernelLibrary:
    """The library to register in a session, and the instruction set that it uses on this processor."""

    path: Path
    instruction_set: str


class KernelsUnavailable(Exception):
    """The library cannot be used here; the message says why, and what to do about it."""


def kernel_library() -> KernelLibrary | None:
    """The library, where it is built, fits the processor, and is not switched off."""
    try:
        return require_kernel_library()
    except KernelsUnavailable:
        return None


def require_kernel_library() -> KernelLibrary:
    """The library. Raises KernelsUnavailable where it cannot be used."""
    if os.environ.get(SWITCH) == "0":
        raise KernelsUnavailable(f"switched off by {SWITCH}=0")
    return _load()


@cache
def _load() -> KernelLibrary:
    path = Path(__file__).with_name("_library.so")
    if not path.is_file():
        raise KernelsUnavailable(
            "not built: they need x86-64 Linux and a C++17 compiler at installation. Where there is one now: "
            + install_command(None, "--force-reinstall", "--no-cache-dir", "--no-deps")
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        again = install_command(None, "--force-reinstall", "--no-cache-dir", "--no-deps")
        raise KernelsUnavailable(f"{path.name} does not load ({error}): {again}") from error
    library.starling_instruction_set.restype = ctypes.c_char_p
    name = library.starling_instruction_set()
    if name is None:
        raise KernelsUnavailable("this processor has neither AVX2 nor AVX-512")
    return KernelLibrary(path, name.decode())

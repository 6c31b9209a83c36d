"""CPU kernels: operators for ONNX Runtime in a C++ library that is built when the package is installed.

Where it is missing (no compiler, another processor, another system) the engine runs the bundle's plain graph with ONNX
Runtime's own operators: the same results within rounding; bf16 bundles run on a CPU by the kernels alone.
`STARLING_CPU_KERNELS=0` does so everywhere; `STARLING_CPU_ISA=avx2` or `avx-vnni` takes what a processor without
AVX-512 would, `=avx512` one without AMX; on ARM `=neon` one without products of matrices (i8mm).
"""

from __future__ import annotations

import ctypes
import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from starling.engine.installation import install_command
from starling.engine.names import DType

SWITCH = "STARLING_CPU_KERNELS"
#: Why none of the kernels runs here, by machine.
LACKING = {"aarch64": "this processor has no dot products of bytes (SDOT, an option from ARMv8.2 on)"}
LACKING_ON_X86 = "this processor has neither AVX2 nor AVX-512"


@dataclass(frozen=True, slots=True)
class KernelLibrary:
    """The library to register in a session, and the instruction sets that it uses on this processor.

    `fp16` and `bf16` are those of products of such weights, `instruction_set` that of all others.
    """

    path: Path
    instruction_set: str
    fp16: str
    bf16: str

    def instruction_set_of(self, dtype: DType) -> str:
        """What multiplies the weights of a bundle of that type."""
        return {"fp16": self.fp16, "bf16": self.bf16}.get(dtype, self.instruction_set)


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
            "not built: they need x86-64 or ARM Linux and a C++17 compiler at installation. Where there is one now: "
            + install_command(None, "--force-reinstall", "--no-cache-dir", "--no-deps")
        )
    try:
        library = ctypes.CDLL(str(path))
        functions = library.starling_instruction_set, library.starling_half_instruction_set
    except (OSError, AttributeError) as error:  # not a library; one of an older version
        again = install_command(None, "--force-reinstall", "--no-cache-dir", "--no-deps")
        raise KernelsUnavailable(f"{path.name} does not load ({error}): {again}") from error
    for function in functions:
        function.restype = ctypes.c_char_p
    functions[1].argtypes = [ctypes.c_bool]
    name = functions[0]()
    if name is None:
        raise KernelsUnavailable(LACKING.get(platform.machine(), LACKING_ON_X86))
    fp16, bf16 = (functions[1](is_bfloat16).decode() for is_bfloat16 in (False, True))
    return KernelLibrary(path, name.decode(), fp16, bf16)

"""Kernels from source: by NVRTC for a card, or by the C++ compiler for emulation."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
_HEADER = "primitives.h"


class CompilationError(Exception):
    """A kernel did not compile, or there is no NVRTC; the message has the compiler's log."""


def cubin(source: str, defines: dict[str, int], arch: str) -> bytes:
    """Machine code of FOLDER / source for `arch` ("sm_90"). Raises CompilationError."""
    nvrtc = _nvrtc()
    program = ctypes.c_void_p()
    text, header = ((FOLDER / name).read_bytes() for name in (source, _HEADER))
    headers, names = (ctypes.c_char_p * 1)(header), (ctypes.c_char_p * 1)(_HEADER.encode())
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, source.encode(), 1, headers, names), "create")
    options = [
        f"-arch={arch}",
        "-std=c++17",
        "-default-device",
        *(f"-D{key}={value}" for key, value in defines.items()),
    ]
    values = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    status = nvrtc.nvrtcCompileProgram(program, len(options), values)
    if status:
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise CompilationError(f"{source} {defines} for {arch}: {log.value.decode(errors='replace')[:2000]}")
    size = ctypes.c_size_t()
    _check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), "size")
    code = ctypes.create_string_buffer(size.value)
    _check(nvrtc.nvrtcGetCUBIN(program, code), "cubin")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return code.raw


def cached_cubin(source: str, defines: dict[str, int], arch: str, cache: Path) -> bytes:
    """The same from the folder `cache`, where it is kept when it has been compiled. Raises CompilationError."""
    texts = b"".join((FOLDER / name).read_bytes() for name in (source, _HEADER))
    key = hashlib.sha256(texts + repr((sorted(defines.items()), arch)).encode()).hexdigest()
    file = cache / f"{source.removesuffix('.cu')}-{arch}-{key[:32]}.cubin"
    try:
        return file.read_bytes()
    except OSError:
        code = cubin(source, defines, arch)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(f".{os.getpid()}-{id(defines)}")
        draft.write_bytes(code)
        draft.replace(file)
    except OSError:  # a cache that cannot be written costs the next process the compilation, and nothing else
        pass
    return code


def emulated(source: str, defines: dict[str, int]) -> ctypes.CDLL:
    """The kernel as a library for the CPU, by g++. Raises CompilationError."""
    flags = [f"-D{key}={value}" for key, value in defines.items()]
    key = b"".join((FOLDER / name).read_bytes() for name in (source, _HEADER, "emulation.h")) + repr(flags).encode()
    library = Path(tempfile.gettempdir()) / f"emulated-{hashlib.sha256(key).hexdigest()[:24]}.so"
    if not library.exists():
        made = library.with_suffix(".new.so")
        command = [
            "g++",
            "-x",
            "c++",
            "-std=c++17",
            "-O2",
            "-fPIC",
            "-shared",
            "-Wno-unknown-pragmas",
            "-DHOST_EMULATION",
        ]
        done = subprocess.run([*command, *flags, str(FOLDER / source), "-o", str(made)], capture_output=True, text=True)
        if done.returncode:
            raise CompilationError(done.stderr[:2000])
        made.rename(library)
    return ctypes.CDLL(str(library))


@cache
def _nvrtc() -> ctypes.CDLL:
    names = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]
    folders = [Path(entry) for entry in sys.path if entry.endswith("site-packages")]
    found = [str(file) for folder in folders for file in sorted(folder.glob("nvidia/*/lib/libnvrtc.so.1?"))]
    for name in [*found, *names, "/usr/local/cuda/lib64/libnvrtc.so"]:
        try:
            for builtins in Path(name).parent.glob("libnvrtc-builtins.so.*"):
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)  # which NVRTC looks for by name alone
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CompilationError("no libnvrtc found: install nvidia-cuda-nvrtc (CUDA 13) or nvidia-cuda-nvrtc-cu12")


def _check(status: int, what: str) -> None:
    if status:
        raise CompilationError(f"NVRTC {what}: error {status}")

"""Compile the libraries that take CUDA's place: build_noop.py HEADERS OUT.

HEADERS are those of the packages nvidia-cuda-runtime and nvidia-cuda-crt.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
COMPILER = ("g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror")
RUNTIME = "libcudart.so.13"
#: Beside the runtime, which the others link to. Of cuRAND nothing is called.
OTHERS = {
    "libcublas.so.13": "noop_blas.cpp",
    "libcublasLt.so.13": "noop_blas.cpp",
    "libcuda.so.1": "noop_driver.cpp",
    "libcurand.so.10": None,
}


def build(headers: Path, out: Path) -> None:
    """All of them."""
    out.mkdir(parents=True, exist_ok=True)
    sources = (HERE / "noop_journal.cpp", HERE / "noop_runtime.cpp")
    compile_library(out / RUNTIME, f"-I{headers}", *map(str, sources))
    for name, source in OTHERS.items():
        compile_library(out / name, *([str(HERE / source)] if source else []), str(out / RUNTIME))


def compile_library(library: Path, *arguments: str) -> None:
    """One, under the name by which it is looked for."""
    subprocess.run([*COMPILER, *arguments, f"-Wl,-soname,{library.name}", "-o", str(library)], check=True)


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]))

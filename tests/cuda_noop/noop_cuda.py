"""Counts of what was asked of the CUDA that does nothing, and backends on it."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from starling.engine.backends.open_backend import open_backend
from starling.engine.bundle.manifest import Bundle

BUNDLES = Path(__file__).parents[2] / "build" / "cuda-noop" / "bundles"


@cache
def _library() -> Any:
    library = ctypes.CDLL("libcudart.so.13")
    library.noop_counts.restype = library.noop_kernels.restype = ctypes.c_char_p
    library.noop_device_bytes.restype = ctypes.c_size_t
    return library


def is_loaded() -> bool:
    """Whether it is what a process here finds as CUDA."""
    try:
        return bool(_library().noop_counts)
    except (OSError, AttributeError):
        return False


def counts() -> Counter[str]:
    """What was asked since the process began."""
    lines = _library().noop_counts().decode().splitlines()
    return Counter({what: int(times) for times, _, what in (line.partition("\t") for line in lines)})


def kernels() -> dict[str, int]:
    """Names of all kernels of all libraries, and the addresses of the fat binaries that they are in."""
    lines = _library().noop_kernels().decode().splitlines()
    return {name: int(address) for name, _, address in (line.partition("\t") for line in lines)}


def device_bytes() -> int:
    return int(_library().noop_device_bytes())


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """What is asked inside, filled in at the end."""
    before = counts()
    found: Counter[str] = Counter()
    yield found
    found.update(counts() - before)


@contextmanager
def opened(name: str, *, rows: int = 1, positions: int = 512, backend: str = "onnxruntime-cuda") -> Iterator[Any]:
    """A backend for a bundle of the room."""
    found = open_backend(Bundle.open(BUNDLES / name), name=backend, max_seq=positions, max_batch=rows)
    try:
        yield found
    finally:
        found.close()

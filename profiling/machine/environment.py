"""Where and when something was measured: versions, machine, GPUs, load; kept with every result."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from starling.profiling.machine.describe import describe_machine

PACKAGES = (
    "starling-llm",
    "numpy",
    "tokenizers",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt-cu13",
    "tensorrt-rtx-cu13",
    "cuda-bindings",
    "nvidia-ml-py",
    "nvtx",
)
#: Variables that change how many threads work, or on which cores.
VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True, slots=True)
class Environment:
    """`created` in UTC, ISO 8601; `load_average` over 1, 5 and 15 minutes, before the measurement (None on Windows)."""

    created: str
    python: str
    system: str
    packages: dict[str, str]
    machine: dict[str, Any]
    load_average: tuple[float, float, float] | None
    variables: dict[str, str]


def describe_environment() -> Environment:
    """Look now."""
    return Environment(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        python=platform.python_version(),
        system=platform.platform(),
        packages=_versions(),
        machine=asdict(describe_machine()),
        load_average=os.getloadavg() if hasattr(os, "getloadavg") else None,
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found

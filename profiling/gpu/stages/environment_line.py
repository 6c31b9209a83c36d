"""What all results of a run have in common: device, driver, versions, date, and the commit that ran."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from starling.engine.backends.onnxruntime.cpu_session import import_onnxruntime
from starling.profiling.gpu.stages import KIT_FILE
from starling.profiling.gpu.stages.kit import Kit

_PACKAGES = ("onnxruntime-gpu", "onnxruntime", "torch", "transformers", "numpy", "tokenizers")
_QUERY = ("name", "memory.total", "driver_version", "compute_cap", "clocks.max.sm", "power.limit")
_DRIVER = Path("/proc/driver/nvidia/version")


def run(kit: Kit) -> None:
    """Write the line."""
    card = _card() if kit.machine.is_card else {}
    about = kit.graphs.parent / KIT_FILE
    kit.results.write(
        device=card.get("name", "CPU"),
        driver=card.get("driver_version") or _driver(),
        card=card,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        python=platform.python_version(),
        versions=_versions(),
        cpu_cores=len(os.sched_getaffinity(0)),
        kit=json.loads(about.read_text(encoding="utf-8")) if about.is_file() else None,
    )


def card_target() -> str:
    """Compute capability of the first GPU, as "sm90"."""
    return "sm" + _card()["compute_cap"].replace(".", "")


def _card() -> dict[str, str]:
    """What nvidia-smi says of the first GPU; {} where it cannot."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(_QUERY, values, strict=True)) if len(values) == len(_QUERY) else {}


def _driver() -> str | None:
    try:
        found = re.search(r"Module\s+(?:for \S+\s+)?([\d.]+)", _DRIVER.read_text(encoding="utf-8"))
    except OSError:
        return None
    return found and found[1]


def _versions() -> dict[str, Any]:
    """By pip's records; an ONNX Runtime that was only unpacked has none."""
    versions: dict[str, Any] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions | {"onnxruntime, as loaded": import_onnxruntime().__version__}

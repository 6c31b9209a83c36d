"""What `starling doctor` finds, as data: versions, machine, providers, GPUs, packages, and what follows from them."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import asdict
from importlib import metadata
from typing import Any

from starling import __version__
from starling.engine.backends.backend import CUDA
from starling.engine.backends.onnxruntime.cpu_session import import_onnxruntime
from starling.engine.backends.tensorrt.runtimes import RUNTIMES, TITLES, RuntimeName, load_library
from starling.engine.errors import BackendError
from starling.engine.installation import extra_packages, install_command
from starling.engine.kernels import KernelsUnavailable, require_kernel_library
from starling.profiling.machine.describe import describe_machine

RUNTIME_PACKAGES = ("onnxruntime", "onnxruntime-gpu")
TENSORRT_PACKAGES = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-rtx", "tensorrt-rtx-cu13", "cuda-bindings")
GPU_FIELDS = ("name", "memory.total", "driver_version", "compute_cap")
GPU_TIMEOUT_S = 10
#: Subject, extra, and what is possible with it.
_FURTHER = (
    ("serve", "serve", "OpenAI's API over a bundle"),
    ("batch --ray", "ray", "batches on a Ray cluster"),
    ("profile on a GPU", "profiling", "NVTX ranges, and the GPU's memory, clocks, power and energy"),
)


def describe_environment() -> dict[str, Any]:
    """The document of `doctor --json`; `findings` has {"subject", "ok", "text"} for each thing that matters."""
    runtime, gpus = _onnxruntime(), _gpus()
    machine = asdict(describe_machine())
    export, tensorrt = _versions(extra_packages("export")), _versions(TENSORRT_PACKAGES)
    findings = [
        _inference(runtime),
        _cuda(runtime, gpus),
        _kernels(),
        _export(export),
        *(_extra(subject, extra, text) for subject, extra, text in _FURTHER),
        *(_tensorrt(name, gpus) for name in RUNTIMES),
    ]
    return {
        "starling": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "machine": machine,
        "onnxruntime": runtime,
        "gpus": gpus,
        "packages": {"export": export, "tensorrt": tensorrt},
        "findings": findings,
    }


def _versions(names: Iterable[str]) -> dict[str, str | None]:
    """Installed version of each distribution, None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _onnxruntime() -> dict[str, Any]:
    packages = {name: version for name, version in _versions(RUNTIME_PACKAGES).items() if version}
    try:
        module = import_onnxruntime()
    except BackendError as error:
        return {"version": None, "packages": packages, "providers": [], "error": str(error)}
    providers = list(module.get_available_providers())
    return {"version": module.__version__, "packages": packages, "providers": providers, "error": None}


def _gpus() -> list[dict[str, str]]:
    """NVIDIA GPUs as nvidia-smi lists them; none where it is absent or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=GPU_TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    keys = ("name", "memory", "driver", "compute_capability")
    return [dict(zip(keys, map(str.strip, line.split(",")), strict=False)) for line in output.splitlines() if line]


def _finding(subject: str, ok: bool, text: str) -> dict[str, Any]:
    return {"subject": subject, "ok": ok, "text": text}


def _inference(runtime: dict[str, Any]) -> dict[str, Any]:
    subject = "generate, chat, profile"
    if len(runtime["packages"]) > 1:
        return _finding(
            subject, False, "onnxruntime and onnxruntime-gpu overwrite each other: uninstall both, then install one"
        )
    if runtime["version"] is None:
        return _finding(subject, False, runtime["error"])
    return _finding(subject, True, "run on the CPU, with bf16 bundles by the CPU kernels alone")


def _cuda(runtime: dict[str, Any], gpus: list[dict[str, str]]) -> dict[str, Any]:
    subject, built = "CUDA", CUDA in runtime["providers"]
    if built and gpus:
        return _finding(subject, True, "fp16 and bf16 bundles run on the GPU (--backend onnxruntime-cuda)")
    if gpus:
        return _finding(subject, False, f"there is a GPU: pip uninstall onnxruntime, then {install_command('gpu')}")
    if built:
        return _finding(subject, False, "this onnxruntime can use CUDA, but nvidia-smi shows no GPU: check the driver")
    return _finding(subject, False, f"no GPU here; on a machine with one: {install_command('gpu')}")


def _kernels() -> dict[str, Any]:
    """The engine's own CPU kernels, and which products they take here."""
    subject = "CPU kernels"
    try:
        library = require_kernel_library()
    except KernelsUnavailable as error:
        return _finding(subject, False, f"{error}; ONNX Runtime's own operators run everything")
    text = f"{library.instruction_set}: int8 and int4 products, and attention; fp16 products {library.fp16}"
    return _finding(subject, True, f"{text}; bf16 products {library.bf16}")


def _export(packages: dict[str, str | None]) -> dict[str, Any]:
    missing = [name for name, version in packages.items() if version is None]
    if missing:
        text = f"needs {', '.join(missing)}: {install_command('export')}"
        return _finding("export", False, text)
    return _finding("export", True, f"checkpoints become bundles (torch {packages.get('torch')})")


def _extra(subject: str, extra: str, text: str) -> dict[str, Any]:
    missing = [name for name, version in _versions(extra_packages(extra)).items() if version is None]
    if missing:
        return _finding(subject, False, f"needs {', '.join(missing)}: {install_command(extra)}")
    return _finding(subject, True, text)


def _tensorrt(name: RuntimeName, gpus: list[dict[str, str]]) -> dict[str, Any]:
    subject = TITLES[name]
    try:
        library = load_library(name)
    except BackendError as error:
        return _finding(subject, False, str(error))
    here = "and runs them here" if gpus else "but runs them on a machine with a GPU"
    if library.targets is not None:
        targets = ", ".join(library.targets)
        return _finding(subject, True, f"{library.version} builds plans ahead of time for {targets}, {here}")
    if not gpus:
        return _finding(subject, False, f"{library.version} builds plans for the GPU that is present: none is here")
    return _finding(subject, True, f"{library.version} builds plans for the GPU that is present, and runs them")

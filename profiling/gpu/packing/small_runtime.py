"""onnxruntime-gpu made small enough to carry: one architecture's machine code, and only what a session loads."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Final

from starling.engine.errors import UserError
from starling.profiling.gpu.packing.fat_binaries import trimmed

VERSION = "1.31.1"
_PYTHON = "3.12"
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64")
_CUDA_LIBRARY = "onnxruntime/capi/libonnxruntime_providers_cuda.so"
_LEFT_OUT = (
    "onnxruntime/capi/libonnxruntime_providers_tensorrt.so",
    "onnxruntime/capi/libonnxruntime.so",
    "onnxruntime/transformers/",
    "onnxruntime/quantization/",
    "onnxruntime/tools/",
    "onnxruntime/datasets/",
    "onnxruntime/ThirdPartyNotices.txt",
)
_XZ_PRESET: Final = 4  # higher ones take minutes more and save a megabyte


@dataclass(frozen=True, slots=True)
class Reachable:
    """Offsets of the fat binaries that the kit's graphs can reach, in the library with this SHA-256."""

    provider_sha256: str
    offsets: frozenset[int]

    @staticmethod
    def read() -> Reachable:
        text = (Path(__file__).parent / "reachable_kernels.txt").read_text(encoding="utf-8")
        digest, *offsets = " ".join(line for line in text.splitlines() if not line.startswith("#")).split()
        return Reachable(digest, frozenset(int(offset, 16) for offset in offsets))


def download(folder: Path) -> Path:
    """The wheel from the package index, by pip. Raises UserError where pip cannot get it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    platforms = [word for platform in _PLATFORMS for word in ("--platform", platform)]
    command += ["--python-version", _PYTHON, "--implementation", "cp", *platforms, "--dest", str(folder)]
    done = subprocess.run([*command, f"onnxruntime-gpu=={VERSION}"], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob(f"onnxruntime_gpu-{VERSION}-*.whl"))
    if done.returncode or not wheels:
        raise UserError(f"pip cannot download onnxruntime-gpu {VERSION}: {done.stderr.strip()[-500:]}; give --wheel")
    return wheels[0]


def write_small_runtime(wheel: Path, archive: Path, architecture: int, say: Callable[[str], None]) -> None:
    """Pack the package onnxruntime of `wheel` into `archive` with the machine code of `architecture` (90 for sm_90)."""
    with zipfile.ZipFile(wheel) as files, tarfile.open(str(archive), "w:xz", preset=_XZ_PRESET) as packed:
        for name in files.namelist():
            if not name.startswith("onnxruntime/") or name.endswith("/") or name.startswith(_LEFT_OUT):
                continue
            content = files.read(name)
            if name == _CUDA_LIBRARY:
                content = _small_library(content, architecture, say)
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o755 if ".so" in name else 0o644
            packed.addfile(entry, BytesIO(content))


def _small_library(library: bytes, architecture: int, say: Callable[[str], None]) -> bytes:
    reachable, digest = Reachable.read(), hashlib.sha256(library).hexdigest()
    is_known = digest == reachable.provider_sha256
    if not is_known:
        say(f"another CUDA library than that of {VERSION}: all its kernels are kept, and the archive is larger")
    result = trimmed(library, architecture, reachable.offsets if is_known else None)
    if not result.kept_bytes:
        raise UserError(f"the wheel has no machine code for sm_{architecture}")
    say(f"device code kept {result.kept_bytes / 1e6:.0f} MB, zeroed {result.zeroed_bytes / 1e6:.0f} MB")
    return result.content

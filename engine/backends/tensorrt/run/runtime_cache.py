"""Kernels that TensorRT for RTX compiled on this machine, kept in the user's cache directory from run to run."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any


def cache_directory() -> Path:
    """Where this user's programs keep what they can make again: $XDG_CACHE_HOME, or the system's usual place."""
    named = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    return (Path(named) if named else Path.home() / ".cache") / "starling" / "tensorrt-rtx"


class RuntimeCache:
    """The compiled kernels of one plan. A file that cannot be read or written costs time, so it is no error."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._cache: Any = None
        self._saved = b""

    def attach(self, config: Any) -> None:
        """Let the contexts that `config` makes use the cache, and add to it."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            with suppress(OSError):
                self._saved = self._file.read_bytes()
            # False where GPU, driver or version have changed; the cache then begins empty.
            if self._saved and not self._cache.deserialize(self._saved):
                self._saved = b""
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write the file where something was compiled since."""
        if self._cache is None:
            return
        memory = self._cache.serialize()
        content = b"" if memory is None else bytes(memory)
        if content == self._saved:
            return
        beside = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(content)
            beside.replace(self._file)
            self._saved = content

"""Kernels that TensorRT for RTX compiled on this machine, kept in the user's cache directory from run to run."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from starling.engine.whole_files import write_whole


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
        with suppress(OSError):
            write_whole(self._file, content)
            self._saved = content

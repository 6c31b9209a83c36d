"""TensorRT's timing cache, kept across builds per version and target: a second build skips what the first one timed.

TensorRT for RTX times nothing when it builds and keeps none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starling.engine.backends.tensorrt.runtimes import Library
from starling.engine.host import cache_folder
from starling.engine.whole_files import write_whole

_DIGEST_BYTES = hashlib.sha256().digest_size


def cache_file(library: Library, targets: Sequence[str]) -> Path:
    """Where the timings for these targets are kept, under the user's cache directory."""
    return cache_folder() / "timing" / f"{library.name}-{library.version}-{'-'.join(targets)}.cache"


def load_timing_cache(config: Any, file: Path) -> str | None:
    """Give a builder configuration the timings kept in `file`, or none; a note where they could not be used."""
    content, note = _read(file)
    cache = config.create_timing_cache(content)
    if not cache or not config.set_timing_cache(cache, False):
        note = f"{file} does not fit this TensorRT: timing again"
        config.set_timing_cache(config.create_timing_cache(b""), False)
    return note


def save_timing_cache(config: Any, file: Path) -> str | None:
    """Keep the timings of a finished build in `file`, SHA-256 first; a note where they could not be kept."""
    content = bytes(config.get_timing_cache().serialize())
    try:
        write_whole(file, hashlib.sha256(content).digest() + content)
    except OSError as error:
        return f"timings are not kept: {file}: {error.strerror or error}"
    return None


def _read(file: Path) -> tuple[bytes, str | None]:
    try:
        stored = file.read_bytes()
    except FileNotFoundError:
        return b"", None
    except OSError as error:
        return b"", f"timings are not read: {file}: {error.strerror or error}"
    digest, content = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        return b"", f"{file} is damaged: timing again"
    return content, None

"""Locks on files and folders that end with their process, on systems that have them (all but Windows)."""

from __future__ import annotations

import errno
import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def try_lock(descriptor: int) -> bool:
    """Lock an open file for this process, until it is closed; False where another one has it.

    Where the system has no such locks the file counts as locked. Raises OSError where the file system refuses.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        return False
    return True


def lock_folder(folder: Path) -> int | None:
    """Lock a folder; the descriptor to close, None where it cannot be locked here.

    Raises BlockingIOError where another process has locked it.
    """
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if try_lock(descriptor):
            return descriptor
    except OSError:  # a file system without locks on folders
        os.close(descriptor)
        return None
    os.close(descriptor)
    raise BlockingIOError(errno.EAGAIN, "another process has it", str(folder))

"""This computer: its threads and memory, the user's cache folder, and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from starling.engine.errors import StarlingError

#: Working folders that this process has not put in place yet.
_WRITING: set[Path] = set()


def default_threads() -> int:
    """Physical cores that this process may run on: hyper-threads share the units that a matrix product needs."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cpus = os.sched_getaffinity(0)
    return len({_siblings(cpu) for cpu in cpus}) or 1


def _siblings(cpu: int) -> str:
    try:
        with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return str(cpu)


def available_memory() -> int:
    """Bytes that can be taken without swapping: MemAvailable where Linux tells it, else all of the memory."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cache_folder() -> Path:
    """Where this user's programs keep what they can make again: $XDG_CACHE_HOME, or the system's usual place."""
    named = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    return (Path(named) if named else Path.home() / ".cache") / "starling"


def write_whole(file: Path, content: bytes) -> None:
    """Write a file that others may read or write meanwhile: they see the old one or the new one. Raises OSError."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(content)
        draft.replace(file)
    finally:
        with suppress(OSError):
            draft.unlink()


@contextmanager
def new_folder(target: Path, check: Callable[[], None]) -> Iterator[Path]:
    """A working folder beside `target`, put in its place when the block ends well and removed when it does not.

    `check` raises where `target` may not be written. It is asked before and after the block: another process may have
    written there meanwhile. A folder that `check` lets stand in the way is replaced; until the new one is in its place
    it is only renamed, and renamed back where that fails.

    The working folder's name starts with a dot and says that it is partial, so a killed run leaves nothing that looks
    whole. The next run to the same place clears that away, and gives an old folder its name back that it finds renamed.

    Raises StarlingError where the disk is full or the place cannot be written.
    """
    work = target.parent / f".{target.name}.partial-{os.getpid()}"
    try:
        _clear_leftovers(target)
        check()
        target.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir()
        _WRITING.add(work)
        try:
            yield work
            _put_in_place(work, target, check)
        finally:
            shutil.rmtree(work, ignore_errors=True)
            _WRITING.discard(work)
    except OSError as error:
        raise _explain(error, target) from error


def _put_in_place(work: Path, target: Path, check: Callable[[], None]) -> None:
    check()
    if not os.path.lexists(target):
        try:
            work.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            check()  # another process was quicker by a hair
        else:
            return
    old = target.parent / f".{target.name}.old-{os.getpid()}"
    try:
        target.rename(old)
        work.rename(target)
    except BaseException:
        if os.path.lexists(old) and not os.path.lexists(target):
            old.rename(target)
        raise
    _remove(old)


def _clear_leftovers(target: Path) -> None:
    """Clear what killed runs to the same place left; one that still runs keeps its own."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*-*"):
        kind, _, process = left.name.removeprefix(f".{target.name}.").rpartition("-")
        if kind not in ("partial", "old") or not process.isdecimal() or left in _WRITING or _is_another_alive(process):
            continue
        if kind == "old" and not os.path.lexists(target):
            left.rename(target)  # its run was killed between two renames
        else:
            _remove(left)


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def _is_another_alive(process: str) -> bool:
    with suppress(OverflowError, ProcessLookupError):
        if int(process) == os.getpid():
            return False  # a container's processes have the numbers of those before it
        try:
            os.kill(int(process), 0)
        except PermissionError:
            return True
        return True
    return False


def _explain(error: OSError, target: Path) -> StarlingError:
    if error.errno == errno.ENOSPC:
        return StarlingError(
            f"the disk is full: writing {target} stopped and nothing was left behind; free space and retry"
        )
    return StarlingError(f"cannot write {target}: {error.strerror or error}")

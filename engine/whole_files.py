"""Files and folders that appear whole or not at all, whenever the process is killed."""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from starling.engine.errors import StarlingError
from starling.engine.file_locks import lock_folder

#: Working folders that this process has not put in place yet.
_WRITING: set[Path] = set()

# Linux' renameat2: paths below the working directory; its flags.
_AT_FDCWD, _NO_REPLACE, _EXCHANGE = -100, 1, 2
#: What a kernel or a file system without such a rename says.
_NO_SUCH_RENAME = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV, errno.EPERM)
#: How often the place may change between the look at it and the rename.
_ATTEMPTS = 8


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
    written there meanwhile. A folder that `check` lets stand in the way changes places with the new one in one step,
    where the system can (Linux, on most file systems); elsewhere it is renamed first, and renamed back where the new
    one cannot take its place.

    The working folder's name starts with a dot and says that it is partial, so a killed run leaves nothing that looks
    whole. The next run to the same place clears that away, and gives an old folder its name back that it finds renamed.

    Raises StarlingError where the disk is full or the place cannot be written.
    """
    work = target.parent / f".{target.name}.partial-{os.getpid()}"
    try:
        _clear_leftovers(target)
        check()
        target.parent.mkdir(parents=True, exist_ok=True)
        with _working_folder(work):
            yield work
            _put_in_place(work, target, check)
    except OSError as error:
        raise _explain(error, target) from error


@contextmanager
def _working_folder(work: Path) -> Iterator[None]:
    """Make the folder, locked for as long as this process works in it; what then has its name is removed."""
    work.mkdir()
    _WRITING.add(work)
    lock = None
    try:
        lock = lock_folder(work)
        yield
    finally:
        _remove(work)
        _WRITING.discard(work)
        if lock is not None:
            os.close(lock)


def _put_in_place(work: Path, target: Path, check: Callable[[], None]) -> None:
    for _ in range(_ATTEMPTS):
        is_taken = os.path.lexists(target)
        check()
        try:
            if is_taken:
                _replace(work, target)
            else:
                _rename_to_nothing(work, target)
        except (FileExistsError, FileNotFoundError):
            continue  # another process was quicker by a hair
        return
    raise StarlingError(f"{target} is written by other processes all the time: give another place")


def _rename_to_nothing(work: Path, target: Path) -> None:
    """Raises FileExistsError where there is something by now."""
    if _renamed(work, target, _NO_REPLACE):
        return
    try:
        work.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR):
            raise FileExistsError(errno.EEXIST, "exists", str(target)) from error
        raise


def _replace(work: Path, target: Path) -> None:
    """Put `work` in the place of `target`, which then has the other's name or is gone."""
    if _renamed(work, target, _EXCHANGE):
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


def _renamed(source: Path, target: Path, flags: int) -> bool:
    """Rename in one step as `flags` say; False where the system or the file system cannot. Raises OSError."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # another system, or an old C library
        return False
    if rename(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_SUCH_RENAME:
        return False
    raise OSError(number, os.strerror(number), str(target))


def _clear_leftovers(target: Path) -> None:
    """Clear what killed runs to the same place left; one that still runs keeps its own."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*-*"):
        kind, _, process = left.name.removeprefix(f".{target.name}.").rpartition("-")
        if kind not in ("partial", "old") or not process.isdecimal() or _is_in_use(left, process):
            continue
        if kind == "old" and not os.path.lexists(target):
            left.rename(target)  # its run was killed between two renames
        else:
            _remove(left)


def _is_in_use(left: Path, process: str) -> bool:
    """Whether the run that made it goes on: by its lock, or where there are no locks by its process' number."""
    if left.is_symlink() or not left.is_dir():
        return left in _WRITING
    try:
        lock = lock_folder(left)
    except (FileNotFoundError, BlockingIOError):  # its run has just ended, or goes on
        return True
    if lock is not None:
        os.close(lock)
        return False
    return left in _WRITING or _is_another_alive(process)


def _is_another_alive(process: str) -> bool:
    with suppress(OverflowError, ProcessLookupError):
        if int(process) == os.getpid():
            return False  # a container's processes have the numbers of those before it
        if os.name == "nt":
            return True  # signal 0 is Ctrl-C there
        try:
            os.kill(int(process), 0)
        except PermissionError:
            return True
        return True
    return False


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def _explain(error: OSError, target: Path) -> StarlingError:
    if error.errno == errno.ENOSPC:
        return StarlingError(
            f"the disk is full: writing {target} stopped and nothing was left behind; free space and retry"
        )
    return StarlingError(f"cannot write {target}: {error.strerror or error}")

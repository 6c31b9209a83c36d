"""Write a plan and its record so that they are there whole or not at all, whatever else builds at the same time."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from starling.engine.backends.tensorrt.engine_folder import FOLDER
from starling.engine.backends.tensorrt.plan_record import EngineRecord
from starling.engine.bundle.file_records import FileRecord
from starling.engine.errors import BuildError, UserError
from starling.engine.file_locks import try_lock
from starling.engine.untrusted_files import is_file_name


def check_engine_name(bundle_folder: Path, name: str, *, force: bool) -> None:
    """Raise UserError where no engine called `name` may be written into the bundle."""
    if not is_file_name(name):
        raise UserError(f"engine name {name!r}: use letters, digits and . _ + -, beginning with a letter or digit")
    for suffix in ("plan", "json"):
        file = bundle_folder / FOLDER / f"{name}.{suffix}"
        if file.exists() and not force:
            raise UserError(f"{file} exists; give another name with --engine, or --force to replace the engine")


class PlanWriter:
    """One engine on its way into a bundle; nobody else writes an engine of its name meanwhile."""

    def __init__(self, partial: Path, descriptor: int, name: str) -> None:
        self.folder = partial.parent
        self._partial, self._descriptor, self._name = partial, descriptor, name
        self._digest, self._bytes = hashlib.sha256(), 0

    def require_space(self, needed: int) -> None:
        """Raise BuildError where the disk has less than `needed` bytes free."""
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise BuildError(
                f"not enough disk space in {self.folder}: the plan needs about {needed / 1e9:.2f} GB, "
                f"{free / 1e9:.2f} GB are free"
            )

    def append(self, piece: memoryview) -> None:
        """Write the next piece of the plan."""
        self._digest.update(piece)
        self._bytes += piece.nbytes
        while piece:
            piece = piece[os.write(self._descriptor, piece) :]

    def written(self) -> FileRecord:
        """Size and digest of the whole plan, which is on the disk then."""
        os.fsync(self._descriptor)
        return FileRecord(self._bytes, self._digest.hexdigest())

    def publish(self, record: EngineRecord) -> None:
        """Put the plan in its place, then its record: without a record beside it a plan is no engine."""
        final = self.folder / f"{self._name}.json"
        draft = self.folder / f".{self._name}.json.partial"
        try:
            text = json.dumps(record.to_json(), indent=2, ensure_ascii=False)
            draft.write_text(text + "\n", encoding="utf-8")
            final.unlink(missing_ok=True)  # a record of the plan before must not stand beside this one
            self._partial.rename(record.plan_path)
            draft.rename(final)
        finally:
            draft.unlink(missing_ok=True)


@contextmanager
def new_engine(bundle_folder: Path, name: str, *, force: bool) -> Iterator[PlanWriter]:
    """A writer for the engine called `name`; what is not published when the block ends is removed.

    Raises:
        UserError: an engine of that name exists and `force` is not set, or the name cannot be one.
        BuildError: another process builds it, the disk is full, or the place cannot be written.
    """
    check_engine_name(bundle_folder, name, force=force)
    folder = bundle_folder / FOLDER
    partial = folder / f".{name}.plan.partial"
    existed = folder.is_dir()
    try:
        folder.mkdir(exist_ok=True)
        descriptor = _lock(partial, name)
        try:
            check_engine_name(bundle_folder, name, force=force)  # another build may have ended just now
            yield PlanWriter(partial, descriptor, name)
        finally:
            _remove_own(partial, descriptor)
            os.close(descriptor)
    except OSError as error:
        raise _explain(error, folder) from error
    finally:
        if not existed:
            with suppress(OSError):
                folder.rmdir()


def _lock(partial: Path, name: str) -> int:
    """Open and lock the partial file: the lock goes with its process, so a killed build's file can be taken over."""
    while True:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o644)
        if not try_lock(descriptor):
            os.close(descriptor)
            raise BuildError(
                f"engine {name} is being built by another process: wait for it, or give another name with --engine"
            )
        if _is_still(partial, descriptor):
            os.truncate(descriptor, 0)
            return descriptor
        os.close(descriptor)  # its builder renamed or removed it between our open and our lock


def _is_still(partial: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(partial.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove_own(partial: Path, descriptor: int) -> None:
    with suppress(OSError):
        if _is_still(partial, descriptor):
            partial.unlink()


def _explain(error: OSError, folder: Path) -> BuildError:
    if error.errno == errno.ENOSPC:
        return BuildError(f"the disk of {folder} is full: the plan was not written; free space and retry")
    return BuildError(f"cannot write an engine to {folder}: {error.strerror or error}")

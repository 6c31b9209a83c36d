"""A batch's output: a line for each result, on the disk before the next is begun, and never a second one."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from starling.engine.errors import UserError
from starling.engine.file_locks import try_lock
from starling.serving.batch.input_lines import Entry

_BLOCK = 2**16


class Journal:
    """The output file, locked against a second writer for as long as it is open."""

    def __init__(self, path: Path) -> None:
        """Open or make the file, and read what it holds.

        A last line without its end, which a kill leaves behind, is cut off: its request is answered again. Raises
        UserError for a file that is no batch's output or that another process writes to.
        """
        self.path = path
        self._file: IO[bytes] = _open(path)
        try:
            _lock(self._file, path)
            #: Bytes of a torn last line that were cut off.
            self.repaired_bytes = _cut_torn_line(self._file)
            #: Fingerprint of each result by its id.
            self._done = _read(self._file, path)
            self._file.seek(0, os.SEEK_END)
            _sync_folder(path)
        except BaseException:
            self._file.close()
            raise

    def __len__(self) -> int:
        return len(self._done)

    def has(self, entry: Entry) -> bool:
        """Whether the entry's result is there. Raises UserError where that of another request has its id."""
        fingerprint = self._done.get(str(entry.id))
        if fingerprint is not None and fingerprint != entry.fingerprint:
            raise UserError(
                f"{self.path} has a result for id {entry.id!r} of another request, settings or bundle than line "
                f"{entry.line} asks for: give another OUTPUT, or delete it to start anew"
            )
        return fingerprint is not None

    def check_known(self, ids: set[str]) -> None:
        """Raises UserError for a result whose entry is gone from the input."""
        gone = next((id_ for id_ in self._done if id_ not in ids), None)
        if gone is not None:
            raise UserError(
                f"{self.path} has a result for id {gone!r}, which the input does not have: "
                "give the input that it was made from, or another OUTPUT"
            )

    def append(self, results: Sequence[tuple[Entry, dict[str, Any]]]) -> None:
        """Write results and wait until they are on the disk."""
        lines = []
        for entry, record in results:
            assert str(entry.id) not in self._done
            line = json.dumps(record | {"fingerprint": entry.fingerprint}, ensure_ascii=False)
            lines.append(line.encode("utf-8", "backslashreplace") + b"\n")
        self._file.write(b"".join(lines))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._done |= {str(entry.id): entry.fingerprint for entry, _ in results}

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()


def check_output(path: Path) -> None:
    """Raises UserError where the path is, or follows to, something else than a regular file: pipe, device, folder."""
    if str(path) == "-" or (os.path.exists(path) and not os.path.isfile(path)):
        raise UserError(f"OUTPUT {path} is no regular file, which later runs could read again: give a file's name")


def _open(path: Path) -> IO[bytes]:
    try:
        return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; give another OUTPUT") from None


def _lock(file: IO[bytes], path: Path) -> None:
    if not try_lock(file.fileno()):
        raise UserError(f"{path} is being written by another batch: wait for it, or give another OUTPUT")


def _cut_torn_line(file: IO[bytes]) -> int:
    """Cut the file after its last line end; the bytes that were cut off."""
    size = end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(end - _BLOCK, 0)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    if end < size:
        file.truncate(end)
        os.fsync(file.fileno())
    return size - end


def _read(file: IO[bytes], path: Path) -> dict[str, str]:
    done: dict[str, str] = {}
    file.seek(0)
    for number, line in enumerate(file, 1):
        try:
            record = json.loads(line)
            id_, fingerprint = (
                str(record["custom_id"] if "custom_id" in record else record["id"]),
                record["fingerprint"],
            )
        except (ValueError, LookupError, TypeError):
            raise UserError(f"{path}, line {number}, is no result of a batch: give another OUTPUT") from None
        if id_ in done:
            raise UserError(f"{path}, line {number}, is a second result for id {id_!r}: give another OUTPUT")
        done[id_] = fingerprint
    return done


def _sync_folder(path: Path) -> None:
    """A new file's name is on the disk only when its folder is."""
    folder = os.open(path.resolve().parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

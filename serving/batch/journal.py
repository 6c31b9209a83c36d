"""A batch's output: a line for each result, on the disk before the next is begun, and never a second one."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from starling.engine.errors import UserError, shown
from starling.engine.file_locks import try_lock
from starling.serving.batch.input_lines import Entry
from starling.serving.batch.result_lines import record_id

#: Bytes of a result's line at most; what is longer is something else.
_LONGEST_LINE = 2**28


class Journal:
    """The output file, locked against a second writer for as long as it is open."""

    def __init__(self, path: Path) -> None:
        """Open or make the file, and read what it holds; nothing in it is changed.

        Raises UserError for a file that is no batch's output or that another process writes to.
        """
        self.path = path
        self._file: IO[bytes] = _open(path)
        try:
            _lock(self._file, path)
            #: Fingerprint of each result by its id.
            self._done: dict[str, str] = {}
            #: A last line without its end, which a kill leaves; b"" where there is none.
            self.torn = self._read()
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
                f"{self.path} has a result for id {shown(entry.id)} of another request, settings or bundle than line "
                f"{entry.line} asks for: give another OUTPUT, or delete it to start anew"
            )
        return fingerprint is not None

    def check_known(self, ids: set[str]) -> None:
        """Raises UserError for a result whose entry is gone from the input."""
        gone = next((id_ for id_ in self._done if id_ not in ids), None)
        if gone is not None:
            raise UserError(
                f"{self.path} has a result for id {shown(gone)}, which the input does not have: "
                "give the input that it was made from, or another OUTPUT"
            )

    def repair(self, missing: Iterable[Entry]) -> None:
        """Cut off the torn line, where it is the beginning of a result of one of the `missing` entries.

        Raises UserError where it is not: then the file is somebody else's.
        """
        for entry in () if _is_other_json(self.torn) else missing:
            begins = _beginning(entry)
            # With whole results before it the file is a batch's, and the line may have been torn anywhere.
            if self.torn.startswith(begins) or (self._done and begins.startswith(self.torn)):
                self._file.truncate(self._file.tell() - len(self.torn))
                self._file.seek(0, os.SEEK_END)
                os.fsync(self._file.fileno())
                self.torn = b""
                return
        raise UserError(
            f"{self.path} ends in the middle of a line that is no result of this batch: give another OUTPUT, or delete "
            "it to start anew"
        )

    def append(self, results: Sequence[tuple[Entry, dict[str, Any]]]) -> None:
        """Write results and wait until they are on the disk."""
        assert not self.torn
        lines = []
        for entry, record in results:
            assert str(entry.id) not in self._done
            lines.append(_encoded(record | {"fingerprint": entry.fingerprint}) + b"\n")
        self._file.write(b"".join(lines))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._done |= {str(entry.id): entry.fingerprint for entry, _ in results}

    def _read(self) -> bytes:
        """Take the results in; what comes after the last line end."""
        self._file.seek(0)
        number = 0
        while line := self._file.readline(_LONGEST_LINE):
            number += 1
            if not line.endswith(b"\n") and len(line) < _LONGEST_LINE:
                return line
            try:
                id_, fingerprint = _fingerprint(line)
            except (ValueError, LookupError, TypeError):
                raise UserError(f"{self.path}, line {number}, is no result of a batch: give another OUTPUT") from None
            if id_ in self._done:
                problem = f"{self.path}, line {number}, is a second result for id {shown(id_)}"
                raise UserError(f"{problem}: give another OUTPUT")
            self._done[id_] = fingerprint
        return b""

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()


def check_output(path: Path) -> None:
    """Raises UserError where the path is, or follows to, something else than a regular file: pipe, device, folder."""
    if str(path) == "-" or (os.path.exists(path) and not os.path.isfile(path)):
        raise _no_file(path)


def _open(path: Path) -> IO[bytes]:
    try:
        # Without waiting for the other end of a pipe.
        opened = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), 0o666)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; give another OUTPUT") from None
    file = os.fdopen(opened, "r+b")
    if not stat.S_ISREG(os.fstat(opened).st_mode):  # also where it took the place of the file that was looked at
        file.close()
        raise _no_file(path)
    return file


def _no_file(path: Path) -> UserError:
    return UserError(f"OUTPUT {path} is no regular file, which later runs could read again: give a file's name")


def _lock(file: IO[bytes], path: Path) -> None:
    if not try_lock(file.fileno()):
        raise UserError(f"{path} is being written by another batch: wait for it, or give another OUTPUT")


def _fingerprint(line: bytes) -> tuple[str, str]:
    """Id and fingerprint of a result's line. Raises ValueError, LookupError or TypeError for another."""
    try:
        record = json.loads(line)
    except RecursionError as error:
        raise ValueError from error
    fingerprint = record["fingerprint"]
    if not isinstance(fingerprint, str):
        raise TypeError
    return str(record["custom_id"] if "custom_id" in record else record["id"]), fingerprint


def _is_other_json(text: bytes) -> bool:
    """Whether it is JSON from its beginning to its end, and no result: nothing of it is torn off."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return not isinstance(document, dict) or "fingerprint" not in document


def _encoded(record: dict[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace")


def _beginning(entry: Entry) -> bytes:
    """What the line of an entry's result begins with, whatever the result is."""
    return _encoded({"id": record_id(entry)})[:-1] + b","


def _sync_folder(path: Path) -> None:
    """A new file's name is on the disk only when its folder is."""
    folder = os.open(path.resolve().parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

"""A batch's input, which is read several times: what can be read only once is copied into a temporary file first."""

from __future__ import annotations

import io
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, cast

from starling.engine.errors import StarlingError, UserError

#: Means stdin, as in most commands; `./-` is a file of that name.
STDIN = "-"
#: Bytes of a line: what is longer is no request.
LONGEST_LINE = 2**24
_COPIED_AT_ONCE = 2**20


class Source:
    """An open input. Its lines can be read from the first one on again and again, by one reader at a time."""

    def __init__(self, name: str, file: IO[bytes]) -> None:
        #: What messages call it.
        self.name = name
        self._file = file

    def lines(self) -> Iterator[bytes]:
        """The lines from the first one on; of one that is longer than LONGEST_LINE, a byte more than that.

        Raises UserError where they cannot be read.
        """
        try:
            self._file.seek(0)
            while line := self._file.readline(LONGEST_LINE + 1):
                yield line
                while len(line) > LONGEST_LINE and not line.endswith(b"\n"):
                    line = self._file.readline(LONGEST_LINE + 1)
        except OSError as error:
            raise _unreadable(self.name, error) from None


@contextmanager
def open_source(path: str) -> Iterator[Source]:
    """Open a file, or what is no regular file (a pipe, a terminal, `-` for stdin), which is copied to its end.

    The copy has no name in the file system, so that it is gone with the process, however that ends. Raises UserError
    where there is nothing to read, StarlingError where the copy does not fit on the disk.
    """
    name = "stdin" if path == STDIN else path
    with ExitStack() as stack:
        try:
            opened = _standard_input() if path == STDIN else stack.enter_context(Path(path).open("rb"))
            regular = stat.S_ISREG(os.fstat(opened.fileno()).st_mode)
        except OSError as error:
            raise _unreadable(name, error) from None
        # A regular file at stdin may have been read in part by another program: what is left of it is the input.
        if regular and path != STDIN:
            yield Source(name, opened)
        else:
            with _temporary_file(name) as copy:
                _copy(name, opened, copy)
                yield Source(name, copy)


def _standard_input() -> io.BufferedReader:
    # None where the program was started with stdin closed; the number 0 may be any file then.
    if sys.stdin is None:
        raise UserError("stdin is closed: give a file, or pipe the lines in")
    return cast(io.BufferedReader, sys.stdin.buffer)


def _temporary_file(name: str) -> IO[bytes]:
    try:
        return tempfile.TemporaryFile(prefix="starling-batch-")
    except OSError as error:
        raise _no_room(name, error) from None


def _copy(name: str, file: io.BufferedReader, copy: IO[bytes]) -> None:
    # A pipe that its other user made non-blocking would seem to end wherever it is empty for a moment.
    os.set_blocking(file.fileno(), True)
    while block := _read(name, file):
        try:
            copy.write(block)
            copy.flush()
        except OSError as error:
            raise _no_room(name, error) from None


def _read(name: str, file: io.BufferedReader) -> bytes:
    try:
        return file.read1(_COPIED_AT_ONCE)  # unlike `read` it takes one Ctrl-D for the end of a terminal's input
    except OSError as error:
        raise _unreadable(name, error) from None


def _unreadable(name: str, error: OSError) -> UserError:
    return UserError(f"{name} cannot be read: {error.strerror}; give a file of JSON lines, or - for stdin")


def _no_room(name: str, error: OSError) -> StarlingError:
    folder = tempfile.tempdir or "a temporary folder"
    return StarlingError(
        f"{name} can be read only once, and cannot be copied to {folder}: {error.strerror}; "
        "set TMPDIR to a folder with room, or give a file"
    )

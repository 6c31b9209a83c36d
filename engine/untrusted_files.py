"""Reads of files that others wrote, checkpoints and bundles: whatever they are, a read ends, and it ends soon.

Every read is of a regular file, never of a pipe or a device, which may have no end; of at most so many bytes; and what
is wrong is said in one line by the caller's class of error, after the file's name.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from starling.engine.errors import UserError, one_line

T = TypeVar("T")

MIB = 2**20
#: The largest JSON or template file: tokenizer.json of a vocabulary of 262,144 tokens has 33 MB.
MOST_BYTES = 256 * MIB
#: How deep JSON may nest; Python's own readers and writers end at about a thousand.
MOST_NESTED = 100
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,119}")
_HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")


def is_file_name(name: object) -> bool:
    """Whether a name out of a file may become a file's name: letters, digits and _ . + -, up to 120."""
    return isinstance(name, str) and _FILE_NAME.fullmatch(name) is not None


def is_inside(name: str) -> bool:
    """Whether a path out of a file stays in its folder on every system: a/b.c, with no part that leads elsewhere."""
    parts = name.split("/")
    is_plain = name.isprintable() and not set(name) & set('\\:*?"<>|')
    return is_plain and all(part.strip(" .") and len(part) < 256 for part in parts)


@dataclass(frozen=True, slots=True)
class FileReader:
    """Reads, and the class of error and the advice with which they fail."""

    error: type[UserError]
    remedy: str

    def bytes(self, file: Path, *, most: int = MOST_BYTES) -> bytes:
        """The file's content. Raises FileNotFoundError, and `error` for a file that is no regular one, or too large."""
        try:
            # A pipe without a writer would keep an ordinary open() waiting.
            descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
            with os.fdopen(descriptor, "rb") as opened:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise self.refuse(file, "is no regular file")
                if status.st_size > most:
                    raise self.refuse(file, f"has {status.st_size:,} bytes, more than {most:,}")
                content = opened.read(most + 1)
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or one_line(error)
            raise self.refuse(file, f"cannot be read: {reason}") from error
        if len(content) > most:  # it has grown, or is a file of /proc
            raise self.refuse(file, f"has more than {most:,} bytes")
        return content

    def text(self, file: Path, *, most: int = MOST_BYTES) -> str:
        """The file's content as UTF-8. Raises as `bytes` does."""
        try:
            return self.bytes(file, most=most).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.refuse(file, f"cannot be read: {one_line(error)}") from error

    def json(self, file: Path, *, most: int = MOST_BYTES) -> dict[str, Any]:
        """The object that is the file's content. Raises as `bytes` does."""
        return self._json(file, dict, "object", most)

    def json_list(self, file: Path, *, most: int = MOST_BYTES) -> list[Any]:
        """The list that is the file's content. Raises as `bytes` does."""
        return self._json(file, list, "list", most)

    def _json(self, file: Path, kind: type[T], name: str, most: int) -> T:
        content = self.bytes(file, most=most)
        try:
            value = json.loads(content.decode("utf-8"))
        except RecursionError as error:
            raise self.refuse(file, f"is not JSON: it nests deeper than {MOST_NESTED}") from error
        except ValueError as error:
            raise self.refuse(file, f"is not JSON ({one_line(error)})") from error
        if not isinstance(value, kind):
            raise self.refuse(file, f"is not a JSON {name}, but a {type(value).__name__}")
        if _nests_deeper(value, MOST_NESTED):
            raise self.refuse(file, f"is not JSON: it nests deeper than {MOST_NESTED}")
        if _HALF_CHARACTER.search(content) and not _is_text(value):
            raise self.refuse(file, "holds half of a UTF-16 pair (\\ud800 to \\udfff), which is no character")
        return value

    def check_regular(self, file: Path) -> None:
        """Raise `error` where the path is there, but neither a regular file nor a link to one."""
        try:
            mode = file.stat().st_mode
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise self.refuse(file, f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
        if not stat.S_ISREG(mode):
            raise self.refuse(file, "is no regular file")

    def check_folder(self, folder: Path, names: Iterable[Path]) -> None:
        """Raise `error` for a file of the folder that is a pipe, a device or a socket, or a link that leads out of it.

        A model hub's cache holds links to the files of its folder `blobs`.
        """
        root = folder.resolve()
        allowed = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
        for file in names:
            mode = file.lstat().st_mode
            if stat.S_ISLNK(mode):
                end = Path(os.path.realpath(file))
                if not any(end.is_relative_to(place) for place in allowed):
                    raise self.refuse(file, f"is a link to {end}, outside the folder", "put the file itself there")
                mode = end.stat().st_mode if end.exists() else stat.S_IFREG
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise self.refuse(file, "is neither a file nor a folder", "remove it")

    def refuse(self, file: Path, problem: str, remedy: str | None = None) -> UserError:
        """The error that says a file's problem."""
        return self.error(f"{file} {problem}: {remedy or self.remedy}")


def _nests_deeper(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _is_text(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True

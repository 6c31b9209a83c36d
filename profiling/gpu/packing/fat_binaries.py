"""Zero the machine code of other architectures in a CUDA library, so that it packs small; its host code stays.

The containers are those that nvcc links into a library (fatbinary.h of the CUDA toolkit): a header of 16 bytes (magic
0xBA55ED50, version 1, size of the header, size of the entries), then entries of a header (kind 1 PTX, 2 machine code,
at offset 28 the architecture) and their content.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass

_MAGIC = struct.pack("<I", 0xBA55ED50)
_HEADER, _ENTRY = struct.Struct("<HHQ"), struct.Struct("<HHIQ")
_VERSION, _MACHINE_CODE = 1, 2
_KINDS = frozenset((1, 2, 4, 8, 16, 32))
_ARCHITECTURE_AT = 28
_SMALLEST_ENTRY, _LARGEST_ENTRY_HEADER = 32, 4096


@dataclass(frozen=True, slots=True)
class Entry:
    """Content at start..end of the library, in the fat binary that begins at `binary`."""

    binary: int
    kind: int
    architecture: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Trimmed:
    """The library, and how many bytes of device code are left in it and were zeroed."""

    content: bytes
    kept_bytes: int
    zeroed_bytes: int


def trimmed(library: bytes, architecture: int, kept: Collection[int] | None = None) -> Trimmed:
    """`library` with machine code of `architecture` alone (90 for sm_90).

    `kept` are the offsets of the fat binaries that are needed; None: all.
    """
    content = bytearray(library)
    kept_bytes = zeroed_bytes = 0
    for entry in entries(library):
        size = entry.end - entry.start
        needed = kept is None or entry.binary in kept
        if needed and entry.kind == _MACHINE_CODE and entry.architecture == architecture:
            kept_bytes += size
        else:
            content[entry.start : entry.end] = bytes(size)
            zeroed_bytes += size
    return Trimmed(bytes(content), kept_bytes, zeroed_bytes)


def entries(library: bytes) -> Iterator[Entry]:
    """Every piece of device code in the library's fat binaries."""
    position = 0
    while 0 <= (position := library.find(_MAGIC, position)) <= len(library) - len(_MAGIC) - _HEADER.size:
        version, header, size = _HEADER.unpack_from(library, position + 4)
        if version != _VERSION or header < 16 or size > len(library) - position:
            position += 4  # the number stands there by chance
            continue
        yield from _entries_of(library, position, position + header, position + header + size)
        position += header


def _entries_of(library: bytes, binary: int, start: int, end: int) -> Iterator[Entry]:
    while start + 64 <= end:
        kind, _, header, size = _ENTRY.unpack_from(library, start)
        if kind not in _KINDS or not _SMALLEST_ENTRY <= header <= _LARGEST_ENTRY_HEADER:
            return
        (architecture,) = struct.unpack_from("<I", library, start + _ARCHITECTURE_AT)
        yield Entry(binary, kind, architecture, start + header, start + header + size)
        start += header + size

"""A GGUF file in parts, as llama.cpp's gguf-split names them: NAME-00001-of-00003.gguf and so on.

The first part has the metadata; every part has tensors, and the keys split.no (from 0), split.count and
split.tensors.count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from starling.engine.errors import CheckpointError

if TYPE_CHECKING:
    from starling.export.checkpoints.gguf_file import GgufFile, GgufTensor

_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def gguf_name(path: Path) -> str:
    """The name of a GGUF file without its ending, and without the number of a part."""
    part = _PART_NAME.fullmatch(path.name)
    return path.stem if part is None else part["stem"]


def check_first_part(path: Path) -> None:
    """Raise CheckpointError where the name is that of a part, but not of the first, which has the metadata."""
    part = _PART_NAME.fullmatch(path.name)
    if part is not None and int(part["number"]) != 1:
        first = path.with_name(f"{part['stem']}-00001-of-{part['count']}.gguf")
        raise CheckpointError(f"{path} is part {int(part['number'])} of {int(part['count'])}: give the first, {first}")


def open_gguf(path: Path) -> GgufFile:
    """Open a GGUF file; the first part of one in parts opens the whole, whose parts must lie in one folder.

    Raises what `read_gguf` raises; CheckpointError where a part is missing or is not of the same file.
    """
    from starling.export.checkpoints.gguf_file import GgufFile, read_gguf

    check_first_part(path)
    file = read_gguf(path)
    count = file.metadata.get("split.count", 1)
    if type(count) is not int or count < 2:
        return file
    parts = list(_parts(file, count))
    return GgufFile(parts[0].path, parts[0].metadata, _joined(parts))


def _parts(given: GgufFile, count: int) -> Iterator[GgufFile]:
    from starling.export.checkpoints.gguf_file import read_gguf

    name = _PART_NAME.fullmatch(given.path.name)
    if name is None or int(name["count"]) != count:
        raise CheckpointError(
            f"{given.path} is a part, one of {count}, but is not named NAME-00001-of-{count:05}.gguf as gguf-split "
            "names parts: give all parts the names that they had"
        )
    for number in range(1, count + 1):
        path = given.path.with_name(f"{name['stem']}-{number:05}-of-{count:05}.gguf")
        if not path.is_file():
            raise CheckpointError(f"{given.path} is one of {count} parts, of which {path} is missing: get that one too")
        part = given if path == given.path else read_gguf(path)
        stated = part.metadata.get("split.no"), part.metadata.get("split.count")
        if stated != (number - 1, count):
            raise CheckpointError(
                f"{path} has split.no {stated[0]} and split.count {stated[1]}, its name says {number - 1} and {count}: "
                "get that part again"
            )
        yield part


def _joined(parts: list[GgufFile]) -> dict[str, GgufTensor]:
    tensors: dict[str, GgufTensor] = {}
    for part in parts:
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise CheckpointError(f"{part.path} and {tensors[name].path} both have tensor {name}: not of one file")
            tensors[name] = tensor
    expected = parts[0].metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise CheckpointError(
            f"the {len(parts)} parts of {parts[0].path} have {len(tensors)} tensors, split.tensors.count is "
            f"{expected}: they are not of one file"
        )
    return tensors

"""The nodes of an ONNX file, read without the onnx package, which belongs to the extra `export`.

By the protobuf wire format (https://protobuf.dev/programming-guides/encoding/); field numbers are those of onnx.proto3.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from starling.engine.errors import BundleError

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_GRAPH, _NODE = 7, 1
_INPUT, _OUTPUT, _NAME, _OPERATOR = 1, 2, 3, 4


class Node(NamedTuple):
    """One node: its name, operator, and the names of the values that it reads and writes."""

    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def read_nodes(file: Path) -> list[Node]:
    """The nodes of the file's graph, in its order. Raises BundleError where it is no ONNX file."""
    try:
        model = memoryview(file.read_bytes())
        return [
            _node(content)
            for field, graph in _messages(model)
            if field == _GRAPH
            for number, content in _messages(graph)
            if number == _NODE
        ]
    except (ValueError, IndexError) as error:
        raise BundleError(f"{file} is not an ONNX file ({error}); export the model again") from error


def _node(message: memoryview) -> Node:
    texts: dict[int, list[str]] = {_INPUT: [], _OUTPUT: [], _NAME: [], _OPERATOR: []}
    for number, content in _messages(message):
        if number in texts:
            texts[number].append(bytes(content).decode())
    name, operator = ("".join(texts[number]) for number in (_NAME, _OPERATOR))
    return Node(name, operator, tuple(texts[_INPUT]), tuple(texts[_OUTPUT]))


def _messages(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of each field that has a length; numbers and such are passed over."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == _LENGTH:
            length, at = _varint(message, at)
            yield key >> 3, message[at : at + length]
            at += length
        elif wire == _VARINT:
            at = _varint(message, at)[1]
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at

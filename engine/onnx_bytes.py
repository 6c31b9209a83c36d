"""ONNX files as bytes, read, rewritten and written without the onnx package, which belongs to the extra `export`.

By the protobuf wire format (https://protobuf.dev/programming-guides/encoding/); field numbers are those of onnx.proto3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias

from starling.engine.errors import BundleError

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {_FIXED64: 8, _FIXED32: 4}

#: ModelProto's graph; its nodes.
GRAPH, NODE = 7, 1
#: Of a NodeProto.
INPUT, OUTPUT, NAME, OPERATOR, ATTRIBUTE = 1, 2, 3, 4, 5

# Where tensors are, by message: the fields to follow, and what each leads to.
_MODEL, _GRAPH, _FUNCTION, _NODE = "model", "graph", "function", "node"
_ATTRIBUTE, _SPARSE, _TENSOR = "attribute", "sparse tensor", "tensor"
_EXTERNAL_DATA = 13
_TENSORS_IN = {
    _MODEL: {GRAPH: _GRAPH, 25: _FUNCTION},
    _GRAPH: {NODE: _NODE, 5: _TENSOR, 15: _SPARSE},
    _FUNCTION: {7: _NODE, 11: _ATTRIBUTE},
    _NODE: {ATTRIBUTE: _ATTRIBUTE},
    _ATTRIBUTE: {5: _TENSOR, 6: _GRAPH, 10: _TENSOR, 11: _GRAPH, 22: _SPARSE, 23: _SPARSE},
    _SPARSE: {1: _TENSOR, 2: _TENSOR},
}

#: Gives the bytes that replace a message.
Edit: TypeAlias = Callable[[memoryview], bytes]


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
            node_of(content)
            for in_model, _, graph in fields(model)
            if in_model == GRAPH
            for number, _, content in fields(graph)
            if number == NODE
        ]
    except ValueError as error:
        raise BundleError(f"{file} is not an ONNX file ({error}); export the model again") from error


def node_of(message: memoryview) -> Node:
    """A NodeProto. Raises ValueError where the bytes are not protobuf."""
    texts: dict[int, list[str]] = {INPUT: [], OUTPUT: [], NAME: [], OPERATOR: []}
    for number, _, content in fields(message):
        if number in texts:
            texts[number].append(bytes(content).decode())
    return Node("".join(texts[NAME]), "".join(texts[OPERATOR]), tuple(texts[INPUT]), tuple(texts[OUTPUT]))


def external_files(model: bytes) -> set[str]:
    """The files that tensors of a ModelProto lie in, by name. Raises ValueError where the bytes are not protobuf."""
    try:
        return set(_locations(memoryview(model), _MODEL))
    except (UnicodeDecodeError, RecursionError) as error:
        raise ValueError(str(error)) from error


def _locations(message: memoryview, kind: str) -> Iterator[str]:
    for number, _, content in fields(message):
        if kind == _TENSOR:
            entry = {key: bytes(text) for key, _, text in fields(content)} if number == _EXTERNAL_DATA else {}
            if entry.get(1) == b"location":
                yield entry.get(2, b"").decode()
        elif number in _TENSORS_IN[kind]:
            yield from _locations(content, _TENSORS_IN[kind][number])


def rewrite(message: memoryview, path: tuple[tuple[int, ...], ...], edit: Edit) -> bytes:
    """The message with every message that `path` leads to edited; each step of `path` has the field numbers to follow.

    Raises ValueError where the bytes are not protobuf.
    """
    if not path:
        return edit(message)
    out = bytearray()
    for number, whole, content in fields(message):
        out += field(number, rewrite(content, path[1:], edit)) if number in path[0] else whole
    return bytes(out)


def fields(message: memoryview) -> Iterator[tuple[int, memoryview, memoryview]]:
    """Each field's number, its whole bytes and its content. Raises ValueError where the bytes are not protobuf."""
    end = 0
    while end < len(message):
        begin = end
        key, at = _read_varint(message, begin)
        number, wire = key >> 3, key & 7
        if wire == _LENGTH:
            length, at = _read_varint(message, at)
            end = at + length
        elif wire == _VARINT:
            end = _read_varint(message, at)[1]
        elif wire in _FIXED_BYTES:
            end = at + _FIXED_BYTES[wire]
        else:
            raise ValueError(f"wire type {wire} at byte {begin}")
        if end > len(message):
            raise ValueError(f"field {number} at byte {begin} ends {end - len(message)} bytes after its message")
        yield number, message[begin:end], message[at:end]


def field(number: int, value: int | str | bytes) -> bytes:
    """A field's bytes: a whole number of 0 or more, a text, or a message."""
    if isinstance(value, int):
        return _varint(number << 3 | _VARINT) + _varint(value)
    content = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | _LENGTH) + _varint(len(content)) + content


def _read_varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message):
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("a number is cut off")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)

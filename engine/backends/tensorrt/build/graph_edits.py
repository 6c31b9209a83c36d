"""What the builder changes in the bytes of an ONNX graph before TensorRT parses it.

TensorRT's parser refuses a KV cache of symbolic length before the network API could set it, and no API takes the mask
from an attention again. The engine does without the onnx package: the few messages on the way are rewritten by the
protobuf wire format (https://protobuf.dev/programming-guides/encoding/); field numbers are those of onnx.proto3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {_FIXED64: 8, _FIXED32: 4}

#: Field numbers from a ModelProto to its dimensions: graph; value_info, input, output; type; tensor_type; shape; dim.
_TO_DIMENSIONS = ((7,), (11, 12, 13), (2,), (1,), (2,), (1,))
_DIM_VALUE, _DIM_PARAM = 1, 2

#: From a ModelProto to its nodes: graph; node.
_TO_NODES = ((7,), (1,))
_NODE_INPUT, _NODE_OP_TYPE, _NODE_ATTRIBUTE = 1, 4, 5
_ATTRIBUTE_NAME, _ATTRIBUTE_STRING = 1, 4

ATTENTION = b"TRT_Attention"
_MASK_INPUT = 3

Edit = Callable[[memoryview], bytes]


def set_dimension(model: bytes, name: str, size: int) -> bytes:
    """The ModelProto `model` with every dimension called `name` of its inputs, outputs and values set to `size`.

    Raises ValueError where the bytes are not protobuf.
    """
    sized = _field(_DIM_VALUE, size)

    def edit(dimension: memoryview) -> bytes:
        named = any(number == _DIM_PARAM and content == name.encode() for number, _, content in _fields(dimension))
        return sized if named else bytes(dimension)

    return _rewrite(memoryview(model), _TO_DIMENSIONS, edit)


def drop_window_masks(model: bytes) -> bytes:
    """The ModelProto `model` with each masked TRT_Attention made causal to the lower right instead.

    For a KV cache no longer than the sliding window, where the two mean the same. Raises ValueError as above.
    """
    return _rewrite(memoryview(model), _TO_NODES, _without_mask)


def _without_mask(node: memoryview) -> bytes:
    fields = list(_fields(node))
    inputs = [content for number, _, content in fields if number == _NODE_INPUT]
    is_attention = any(number == _NODE_OP_TYPE and content == ATTENTION for number, _, content in fields)
    if not is_attention or len(inputs) <= _MASK_INPUT or not inputs[_MASK_INPUT]:
        return bytes(node)
    out, seen = bytearray(), 0
    for number, whole, content in fields:
        if number == _NODE_INPUT:
            out += _field(_NODE_INPUT, b"") if seen == _MASK_INPUT else whole
            seen += 1
        elif number == _NODE_ATTRIBUTE:
            out += _field(_NODE_ATTRIBUTE, _lower_right(content))
        else:
            out += whole
    return bytes(out)


def _lower_right(attribute: memoryview) -> bytes:
    fields = list(_fields(attribute))
    if not any(number == _ATTRIBUTE_NAME and bytes(content) == b"causal_kind" for number, _, content in fields):
        return bytes(attribute)
    kind = _field(_ATTRIBUTE_STRING, b"lower_right")
    return b"".join(kind if number == _ATTRIBUTE_STRING else bytes(whole) for number, whole, _ in fields)


def _rewrite(message: memoryview, path: tuple[tuple[int, ...], ...], edit: Edit) -> bytes:
    """A message in which `edit` has replaced every message that `path` leads to."""
    if not path:
        return edit(message)
    out = bytearray()
    for number, whole, content in _fields(message):
        out += _field(number, _rewrite(content, path[1:], edit)) if number in path[0] else whole
    return bytes(out)


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview, memoryview]]:
    """Each field's number, its whole bytes and its content."""
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
            raise ValueError(f"field {number} at byte {begin} ends {end - len(message)} bytes behind its message")
        yield number, message[begin:end], message[at:end]


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3 | _VARINT) + _varint(value)
    return _varint(number << 3 | _LENGTH) + _varint(len(value)) + value


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

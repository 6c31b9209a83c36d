"""What the builder changes in the bytes of an ONNX graph before TensorRT parses it.

TensorRT's parser refuses a KV cache of symbolic length before the network API could set it, and no API takes the mask
from an attention again.
"""

from __future__ import annotations

from starling.engine.onnx_bytes import ATTRIBUTE, GRAPH, INPUT, NODE, OPERATOR, field, fields, rewrite

#: Field numbers from a ModelProto to its dimensions: graph; value_info, input, output; type; tensor_type; shape; dim.
_TO_DIMENSIONS = ((GRAPH,), (11, 12, 13), (2,), (1,), (2,), (1,))
_DIM_VALUE, _DIM_PARAM = 1, 2
_TO_NODES = ((GRAPH,), (NODE,))
_ATTRIBUTE_NAME, _ATTRIBUTE_STRING = 1, 4

ATTENTION = b"TRT_Attention"
_MASK_INPUT = 3


def set_dimension(model: bytes, name: str, size: int) -> bytes:
    """The ModelProto `model` with every dimension called `name` of its inputs, outputs and values set to `size`.

    Raises ValueError where the bytes are not protobuf.
    """
    sized = field(_DIM_VALUE, size)

    def edit(dimension: memoryview) -> bytes:
        named = any(number == _DIM_PARAM and content == name.encode() for number, _, content in fields(dimension))
        return sized if named else bytes(dimension)

    return rewrite(memoryview(model), _TO_DIMENSIONS, edit)


def drop_window_masks(model: bytes) -> bytes:
    """The ModelProto `model` with each masked TRT_Attention made causal to the lower right instead.

    For a KV cache no longer than the sliding window, where the two mean the same. Raises ValueError as above.
    """
    return rewrite(memoryview(model), _TO_NODES, _without_mask)


def _without_mask(node: memoryview) -> bytes:
    parts = list(fields(node))
    inputs = [content for number, _, content in parts if number == INPUT]
    is_attention = any(number == OPERATOR and content == ATTENTION for number, _, content in parts)
    if not is_attention or len(inputs) <= _MASK_INPUT or not inputs[_MASK_INPUT]:
        return bytes(node)
    out, seen = bytearray(), 0
    for number, whole, content in parts:
        if number == INPUT:
            out += field(INPUT, b"") if seen == _MASK_INPUT else whole
            seen += 1
        elif number == ATTRIBUTE:
            out += field(ATTRIBUTE, _lower_right(content))
        else:
            out += whole
    return bytes(out)


def _lower_right(attribute: memoryview) -> bytes:
    parts = list(fields(attribute))
    if not any(number == _ATTRIBUTE_NAME and bytes(content) == b"causal_kind" for number, _, content in parts):
        return bytes(attribute)
    kind = field(_ATTRIBUTE_STRING, b"lower_right")
    return b"".join(kind if number == _ATTRIBUTE_STRING else bytes(whole) for number, whole, _ in parts)

"""What the builder changes in the bytes of an ONNX graph before TensorRT parses it.

TensorRT's parser refuses a KV cache of symbolic length before the network API could set it, and no API takes the mask
from an attention again.
"""

from __future__ import annotations

from collections.abc import Sequence

from starling.engine.names import NEXT_TOKENS, PAST_LENGTHS, TEMPERATURE, TOP_K, TOP_P
from starling.engine.onnx_bytes import ATTRIBUTE, GRAPH, INPUT, NODE, OPERATOR, Node, field, fields, node_of, rewrite

#: Field numbers from a ModelProto to its dimensions: graph; value_info, input, output; type; tensor_type; shape; dim.
_TO_DIMENSIONS = ((GRAPH,), (11, 12, 13), (2,), (1,), (2,), (1,))
_DIM_VALUE, _DIM_PARAM = 1, 2
_TO_NODES = ((GRAPH,), (NODE,))
_ATTRIBUTE_NAME, _ATTRIBUTE_STRING = 1, 4
#: Of a GraphProto; the name in a ValueInfoProto.
_GRAPH_INPUT, _GRAPH_OUTPUT, _VALUE_NAME = 11, 12, 1

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


def drop_draws(model: bytes) -> bytes:
    """The ModelProto `model` whose `next_tokens` are the likeliest ones, without the 50 nodes and the inputs of a draw.

    Raises ValueError as above, and where the choice is not made as `export/dialects/device_sampling.py` makes it.
    """
    return rewrite(memoryview(model), ((GRAPH,),), _greedy)


def _greedy(graph: memoryview) -> bytes:
    """`next_tokens` is Where(finite, Where(greedy, likeliest, drawn), -1)."""
    nodes = [node_of(content) for number, _, content in fields(graph) if number == NODE]
    makers = {output: _batch_of_lengths(node) for node in nodes for output in node.outputs}
    checked = makers.get(NEXT_TOKENS)
    chosen = None if checked is None else makers.get(checked.inputs[1])
    if checked is None or chosen is None or {checked.operator, chosen.operator} != {"Where"}:
        raise ValueError(f"{NEXT_TOKENS} is no choice between the likeliest token and a drawn one")
    makers[NEXT_TOKENS] = checked._replace(inputs=(checked.inputs[0], chosen.inputs[1], *checked.inputs[2:]))
    used = _reach(makers, [_value_name(content) for number, _, content in fields(graph) if number == _GRAPH_OUTPUT])
    out = bytearray()
    for number, whole, content in fields(graph):
        if number == NODE:
            node = node_of(content)
            if not used.isdisjoint(node.outputs):
                out += field(NODE, _rewired(content, makers[node.outputs[0]].inputs))
        elif number != _GRAPH_INPUT or _value_name(content) in used:
            out += whole
    return bytes(out)


def _reach(makers: dict[str, Node], outputs: list[str]) -> set[str]:
    """The values that the outputs depend on, themselves included."""
    used, left = set(outputs), list(outputs)
    while left:
        node = makers.get(left.pop())
        found = set() if node is None else {*node.inputs} - used
        used |= found
        left += found
    return used


def _value_name(value: memoryview) -> str:
    return next(bytes(content).decode() for number, _, content in fields(value) if number == _VALUE_NAME)


def _batch_of_lengths(node: Node) -> Node:
    """The tracer asks any input of [batch] for the batch: one that stays has the same."""
    if node.operator != "Shape" or node.inputs[0] not in (TEMPERATURE, TOP_K, TOP_P):
        return node
    return node._replace(inputs=(PAST_LENGTHS,))


def _rewired(node: memoryview, inputs: Sequence[str]) -> bytes:
    left = iter(inputs)
    return b"".join(field(INPUT, next(left)) if number == INPUT else bytes(whole) for number, whole, _ in fields(node))


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

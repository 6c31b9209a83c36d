"""A graph of 16 bits rewritten to compute in float32, with its large weights left as they are stored."""

import numpy as np
import onnx_ir as ir

from starling.export.graphs.rewrites import required

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
#: Attributes that say a type in these operators; one of another operator is not known.
_TYPED = {"Cast": "to", "Constant": "value", "ConstantOfShape": "value"}


def can_compute_in_float32(graph: ir.Graph) -> bool:
    """Whether every operator that says a type says it where `compute_in_float32` looks."""
    return all(
        _TYPED.get(node.op_type) == name
        for node in graph
        for name, attribute in node.attributes.items()
        if attribute.type in (ir.AttributeType.TENSOR, ir.AttributeType.TENSORS) or (name in ("to", "dtype"))
    )


def compute_in_float32(graph: ir.Graph, weights: set[ir.Value], cache: set[ir.Value]) -> None:
    """Widen everything of 16 bits but `weights` and `cache`, which stay as they are.

    What is gathered of a weight is widened after. ONNX Runtime folds the casts of the other initializers when it loads
    the graph.
    """
    for node in list(graph):
        if node.op_type == "Gather" and node.inputs[0] in weights:
            _cast_after(graph, node)
        elif node.op_type in _TYPED:
            _say_float32(node)
    first = graph[0]
    for value in list(graph.initializers.values()):
        if value.dtype in HALVES and value not in weights:
            cast = _cast(value)
            graph.insert_before(first, cast)
            for use in value.uses():
                if use.node is not cast:
                    use.node.replace_input_with(use.idx, cast.outputs[0])
    for node in graph:
        for value in node.outputs:
            if value.dtype in HALVES and value not in cache and not _is_stored(node, weights):
                value.type = ir.TensorType(ir.DataType.FLOAT)  # a clone's values share their types with the original's


def _is_stored(node: ir.Node, weights: set[ir.Value]) -> bool:
    return node.op_type == "Gather" and node.inputs[0] in weights


def _cast(value: ir.Value) -> ir.Node:
    cast = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT})
    cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), value.shape
    return cast


def _cast_after(graph: ir.Graph, node: ir.Node) -> None:
    value = node.outputs[0]
    users = list(value.uses())
    cast = _cast(value)
    graph.insert_after(node, cast)
    for use in users:
        use.node.replace_input_with(use.idx, cast.outputs[0])


def _say_float32(node: ir.Node) -> None:
    name = _TYPED[node.op_type]
    attribute = node.attributes.get(name)
    if attribute is None:
        return
    if name == "to":
        if attribute.as_int() in HALVES:
            node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT)
        return
    tensor = attribute.as_tensor()
    if tensor.dtype in HALVES:
        wide = tensor.numpy().astype(np.float32)
        node.attributes[name] = ir.AttrTensor(name, ir.tensor(wide, name=required(node.outputs[0]).name))

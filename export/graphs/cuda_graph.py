"""A second graph over the same weights, for decode steps that stay on a GPU: what it chose is what it reads next.

Measured on an NVIDIA H200 with ONNX Runtime 1.31 at the shape of a 7B model (profiling/results).
"""

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as common_passes

from starling.engine.names import LOGITS, NEXT_SEQLENS, NEXT_TOKENS
from starling.export.graphs.kernel_graph import fuse_products
from starling.export.graphs.rewrites import STARLING, insert, required, take_over
from starling.export.quantization.blocks import BlockQuantization
from starling.export.weights.weight_file import ROW_MULTIPLE

GRAPH_FILE = "model_cuda.onnx"
KERNEL_GRAPH_FILE = "model_cuda_kernels.onnx"
_LARGEST = float(np.finfo(np.float32).max)


def cuda_graph(model: ir.Model, how: BlockQuantization | None) -> ir.Model | None:
    """The `ort` graph with a checked choice and lengths that advance; None for float32, which has no CUDA attention.

    `next_tokens` is -1 where the greatest logit is not finite. `next_seqlens_k` int32 [batch] is the next step's
    `seqlens_k`; it is computed after everything that reads `seqlens_k`, so that both may be the same memory.
    """
    if any(value.dtype == ir.DataType.FLOAT for value in model.graph.outputs if value.name == LOGITS):
        return None
    twin = model.clone()
    graph = twin.graph
    for node in [node for node in graph if node.op_type == "MatMulNBits"]:
        assert how is not None
        if how.at(node.attributes["bits"].as_int()).is_symmetric:
            _drop_zero_points(node)
            _pad_rows(graph, node)
    _advance_lengths(graph, _check_choice(graph))
    common_passes.RemoveUnusedNodesPass()(twin)
    return twin


def cuda_kernel_graph(model: ir.Model, how: BlockQuantization | None) -> tuple[ir.Model, list[dict[str, Any]]] | None:
    """The graph of `cuda_graph` for the engine's own CUDA kernels, and the products in it; None where they do not fit.

    They are for float16 between the products, and products in symmetric int8 in blocks of 32 without a bias.
    """
    nodes = [node for node in model.graph if node.op_type == "MatMulNBits"]
    if how is None or not how.is_symmetric or not nodes or not all(_has_kernel(node) for node in nodes):
        return None
    twin = model.clone()
    graph = twin.graph
    fuse_products(graph, how)
    _advance_lengths(graph, _check_choice(graph))
    common_passes.RemoveUnusedNodesPass()(twin)
    twin.opset_imports[STARLING] = 1
    products = [_product(node) for node in graph if node.op_type == "QuantizedLinear"]
    if any(product["around"] == "gated" and product["n"] % 16 for product in products):
        return None
    return twin, [product for index, product in enumerate(products) if product not in products[:index]]


def _has_kernel(product: ir.Node) -> bool:
    scales = product.inputs[2]
    sizes = [product.attributes[name].as_int() for name in ("bits", "block_size")]
    is_half = scales is not None and scales.dtype == ir.DataType.FLOAT16
    return sizes == [8, 32] and is_half and len(product.inputs) < 6 and product.attributes["K"].as_int() % 64 == 0


def _product(linear: ir.Node) -> dict[str, Any]:
    inputs = [*linear.inputs, *[None] * 6]
    around = "gated" if linear.attributes["gated"].as_int() else "residual" if inputs[5] is not None else "none"
    sizes = {name.lower(): linear.attributes[name].as_int() for name in ("K", "N")}
    return {**sizes, "norm": inputs[3] is not None, "around": around}


def _drop_zero_points(product: ir.Node) -> None:
    """Without them the middle of the range is meant, which is what a symmetric scheme stores.

    ONNX Runtime's fastest kernels take no zero points: 22 µs a product instead of 28, and no dequantized copy of the
    weights from four rows up (4.0 ms a step instead of 10.4).
    """
    product.replace_input_with(3, None)


def _pad_rows(graph: ir.Graph, product: ir.Node) -> None:
    """Take in the rows of zeros that the weight file has after a weight (lm_head's, as a rule), and drop their results.

    Without them an lm_head of 32,002 rows was dequantized at every step: 240 µs.
    """
    rows = product.attributes["N"].as_int()
    missing = -rows % ROW_MULTIPLE
    if missing == 0:
        return
    for index in (1, 2):
        product.replace_input_with(index, _with_rows(graph, required(product.inputs[index]), rows + missing))
    product.attributes["N"] = ir.AttrInt64("N", rows + missing)
    old = product.outputs[0]
    uses, shape = old.uses(), old.shape
    bounds = [_constant(graph, product, np.array([at], np.int64)) for at in (0, rows, -1)]
    cut = ir.node("Slice", [old, *bounds])
    graph.insert_after(product, cut)
    cut.outputs[0].type, cut.outputs[0].shape, old.shape = old.type, shape, None
    for use in uses:
        use.node.replace_input_with(use.idx, cut.outputs[0])
    if old.is_graph_output():
        name = old.name
        old.name, cut.outputs[0].name = f"{name}_padded", name
        graph.outputs[graph.outputs.index(old)] = cut.outputs[0]


def _with_rows(graph: ir.Graph, weight: ir.Value, rows: int) -> ir.Value:
    """The weight as an initializer of more rows, which lie after its own in the same file."""
    stored = weight.const_value
    assert isinstance(stored, ir.ExternalTensor)
    assert stored.offset is not None
    assert stored.length is not None
    own, *rest = (int(d) for d in stored.shape.numpy())
    name, length = f"{weight.name}_padded", stored.length // own * rows
    if name not in graph.initializers:
        tensor = ir.ExternalTensor(
            stored.location, stored.offset, length, stored.dtype, shape=ir.Shape([rows, *rest]), name=name,
            base_dir=stored.base_dir,
        )  # fmt: skip
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(stored.dtype), const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]


def _check_choice(graph: ir.Graph) -> ir.Value:
    """Give -1 as the token of a row whose greatest logit is not finite; whether it is, bool [batch, kept, 1]."""
    choice = next(value.producer() for value in graph.outputs if value.name == NEXT_TOKENS)
    assert choice is not None
    assert choice.op_type == "ArgMax"
    scores, old = required(choice.inputs[0]), choice.outputs[0]

    def add(operator: str, *inputs: ir.Value, **attributes: int | float) -> ir.Value:
        return insert(graph, choice, ir.node(operator, inputs, attributes=attributes))

    likeliest = add("ArgMax", scores, axis=-1, keepdims=1)
    greatest = add("GatherElements", scores, likeliest, axis=-1)
    size = add("Abs", add("Cast", greatest, to=ir.DataType.FLOAT))
    finite = add("LessOrEqual", size, _constant(graph, choice, np.array(_LARGEST, np.float32)))
    checked = add("Where", finite, likeliest, _constant(graph, choice, np.array(-1, np.int64)))
    tokens = add("Squeeze", checked, _constant(graph, choice, np.array([-1], np.int64)))
    take_over(old, tokens)
    graph.remove(choice, safe=True)
    return finite


def _advance_lengths(graph: ir.Graph, finite: ir.Value) -> None:
    """One more for each row, by way of the choice: nothing that comes before the choice may find it there already."""
    lengths = next(value for value in graph.inputs if value.name == "seqlens_k")
    assert lengths.shape is not None
    first, last = np.array(0, np.int64), np.array([-1], np.int64)
    for operator, others, attributes in (
        ("Gather", (first,), {"axis": 1}),
        ("Squeeze", (last,), {}),
        ("Cast", (), {"to": ir.DataType.INT32}),
    ):
        inputs = [
            finite,
            *(_append(graph, ir.node("Constant", [], attributes={"value": ir.tensor(a)})) for a in others),
        ]
        finite = _append(graph, ir.node(operator, inputs, attributes=attributes))
    advanced = _append(graph, ir.node("Add", [lengths, finite]))
    advanced.name, advanced.dtype, advanced.shape = NEXT_SEQLENS, ir.DataType.INT32, lengths.shape
    graph.outputs.append(advanced)


def _append(graph: ir.Graph, node: ir.Node) -> ir.Value:
    graph.append(node)
    return node.outputs[0]


def _constant(graph: ir.Graph, before: ir.Node, value: np.ndarray) -> ir.Value:
    return insert(graph, before, ir.node("Constant", [], attributes={"value": ir.tensor(value)}))

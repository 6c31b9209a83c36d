"""Write the abstract projections and embeddings of a graph as operators, in full precision or quantized."""

import onnx_ir as ir

from starling.export.graphs.expert_operators import write_experts
from starling.export.graphs.rewrites import (
    MICROSOFT,
    STARLING,
    insert,
    insert_constant,
    is_embedding,
    is_experts,
    is_linear,
    routers,
    score_heads,
    take_over,
)
from starling.export.quantization.block_plan import BlockPlan
from starling.export.quantization.qdq_projections import QdqPlan, QdqWriter
from starling.export.weights.weight_plan import Blocks, Rows, new_weight, rows_of


def write_projections(model: ir.Model, quantization: BlockPlan | QdqPlan | None) -> None:
    """Replace every `starling::Linear` and `starling::Embedding` of the graph in place.

    Full precision: MatMul with the weight stored [in, out]; a weight shared with the embedding stays [vocab, hidden]
    for both. In blocks: MatMulNBits and GatherBlockQuantized over the same bytes where the two are tied. By a plan:
    DequantizeLinear in front of the projections that it does not keep.
    """
    if isinstance(quantization, BlockPlan):
        _write_blocks(model.graph, quantization)
        model.opset_imports.setdefault(MICROSOFT, 1)
    else:
        _write_products(model.graph, quantization)
    model.opset_imports.pop(STARLING, None)
    initializers = model.graph.initializers
    for name in [name for name, value in initializers.items() if not value.uses()]:
        initializers.pop(name)


def _write_blocks(graph: ir.Graph, plan: BlockPlan) -> None:
    whole = routers(graph) | score_heads(graph)
    for node in list(graph):
        if node in whole:
            _replace(graph, node, _linear(graph, node))
        elif is_linear(node):
            _replace(graph, node, _quantized_linear(graph, node, plan))
        elif is_embedding(node):
            _replace(graph, node, _quantized_embedding(graph, node, plan))
        elif is_experts(node):
            _replace(graph, node, write_experts(graph, node, plan.how))


def _write_products(graph: ir.Graph, plan: QdqPlan | None) -> None:
    embedded = {rows_of(n.inputs[1]) for n in graph if is_embedding(n)}
    writer = QdqWriter(graph, plan) if plan is not None else None
    for node in list(graph):
        if is_embedding(node):
            _replace(graph, node, _embedding(graph, node))
        elif is_experts(node):
            _replace(graph, node, write_experts(graph, node, None))
            graph.opset_imports.setdefault(MICROSOFT, 1)
        elif is_linear(node):
            if writer is not None and writer.is_quantized(node):
                output = writer.linear(node)
            else:
                if writer is not None:
                    node.replace_input_with(0, writer.input(node))
                shared = rows_of(node.inputs[1]) in embedded
                output = _shared_linear(graph, node) if shared else _linear(graph, node)
            _replace(graph, node, output)


def _replace(graph: ir.Graph, node: ir.Node, output: ir.Value) -> None:
    take_over(node.outputs[0], output)
    graph.remove(node, safe=True)


def _parts(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value | None, int, int]:
    """Input, weight, bias, and the weight's rows and columns."""
    x, weight, *bias = node.inputs
    assert x is not None
    assert weight is not None
    assert weight.shape is not None
    rows, columns = (int(d) for d in weight.shape)  # type: ignore[arg-type]
    return x, weight, bias[0] if bias else None, rows, columns


def _linear(graph: ir.Graph, node: ir.Node) -> ir.Value:
    x, weight, bias, rows, columns = _parts(node)
    assert weight.dtype is not None
    source = Rows(rows_of(weight).names, transposed=True)
    transposed = new_weight(graph, f"{weight.name}_t", weight.dtype, (columns, rows), source)
    product = insert(graph, node, ir.node("MatMul", [x, transposed]))
    return product if bias is None else insert(graph, node, ir.node("Add", [product, bias]))


def _shared_linear(graph: ir.Graph, node: ir.Node) -> ir.Value:
    """Gemm reads the weight as it stands; it wants two axes, so the leading ones are folded and unfolded."""
    x, weight, bias, rows, columns = _parts(node)
    flat = insert(graph, node, ir.node("Reshape", [x, insert_constant(graph, node, [-1, columns])]))
    inputs = [flat, weight] if bias is None else [flat, weight, bias]
    product = insert(graph, node, ir.node("Gemm", inputs, attributes={"transB": 1}))
    shape = insert(graph, node, ir.node("Shape", [x], attributes={"end": -1}))
    last = insert_constant(graph, node, [rows])
    whole = insert(graph, node, ir.node("Concat", [shape, last], attributes={"axis": 0}))
    return insert(graph, node, ir.node("Reshape", [product, whole]))


def _embedding(graph: ir.Graph, node: ir.Node) -> ir.Value:
    ids, table = node.inputs
    return insert(graph, node, ir.node("Gather", [table, ids], attributes={"axis": 0}))


def _block_weights(
    graph: ir.Graph, node: ir.Node, weight: ir.Value, plan: BlockPlan, *, flat: bool
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Data, scales and zero points of a quantized weight, for `node`.

    MatMulNBits sees the data as [rows, blocks, bytes], GatherBlockQuantized (`flat`) the same bytes as [rows, bytes].
    """
    assert weight.shape is not None
    assert weight.dtype is not None
    rows, columns = (int(d) for d in weight.shape)  # type: ignore[arg-type]
    source, uint8 = rows_of(weight), ir.DataType.UINT8
    how = plan.of(source.names)
    blocks, width = how.blocks(columns), how.block_size * how.bits // 8
    data_shape = (rows, blocks * width) if flat else (rows, blocks, width)
    suffix = "_rows" if flat else ""
    data = new_weight(graph, f"{weight.name}_q{how.bits}{suffix}", uint8, data_shape, Blocks(source, "data"))
    # Two bytes hold them; at 4 bits a weight four bytes for 32 of them would be a tenth of all.
    stored = ir.DataType.FLOAT16 if plan.how.bits == 4 and weight.dtype == ir.DataType.FLOAT else weight.dtype
    scales = new_weight(graph, f"{weight.name}_scales", stored, (rows, blocks), Blocks(source, "scales"))
    zero_shape = (rows, -(-blocks * how.bits // 8))
    zeros = new_weight(graph, f"{weight.name}_zero_points", uint8, zero_shape, Blocks(source, "zero_points"))
    return data, _cast(graph, node, scales, weight.dtype), zeros


def _cast(graph: ir.Graph, before: ir.Node, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """`value` in another type; runtimes do that once, when they load the graph."""
    if value.dtype == dtype:
        return value
    known = next((use.node.outputs[0] for use in value.uses() if use.node.op_type == "Cast"), None)
    if known is not None:
        return known
    cast = insert(graph, before, ir.node("Cast", [value], attributes={"to": dtype}))
    cast.type, cast.shape = ir.TensorType(dtype), value.shape
    return cast


def _quantized_linear(graph: ir.Graph, node: ir.Node, plan: BlockPlan) -> ir.Value:
    x, weight, bias, rows, columns = _parts(node)
    how = plan.of(rows_of(weight).names)
    inputs: list[ir.Value | None] = [x, *_block_weights(graph, node, weight, plan, flat=False)]
    if bias is not None:
        inputs += [None, bias]
    attributes = {
        "K": columns,
        "N": rows,
        "bits": how.bits,
        "block_size": how.block_size,
        "accuracy_level": how.accuracy_level,
    }
    return insert(graph, node, ir.node("MatMulNBits", inputs, attributes=attributes, domain=MICROSOFT))


def _quantized_embedding(graph: ir.Graph, node: ir.Node, plan: BlockPlan) -> ir.Value:
    ids, table = node.inputs
    assert table is not None
    how = plan.of(rows_of(table).names)
    data, scales, zeros = _block_weights(graph, node, table, plan, flat=True)
    attributes = {"bits": how.bits, "block_size": how.block_size, "gather_axis": 0, "quantize_axis": 1}
    inputs = [data, ids, scales, zeros]
    gather = ir.node("GatherBlockQuantized", inputs, attributes=attributes, domain=MICROSOFT)
    gathered = insert(graph, node, gather)
    assert table.shape is not None
    columns = int(table.shape[1])  # type: ignore[arg-type]
    if columns % how.block_size == 0:
        return gathered
    # the last block of a row is stored whole: what is after the embedding's width is cut off again
    bounds = [insert_constant(graph, node, [at]) for at in (0, columns, -1)]
    return insert(graph, node, ir.node("Slice", [gathered, *bounds]))

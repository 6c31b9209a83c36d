"""The abstract experts of a graph as com.microsoft MoE, or QMoE over weights in blocks.

Both read the weights of the experts that a token chose, and no others.
"""

import onnx_ir as ir

from starling.export.graphs.rewrites import MICROSOFT, insert, required
from starling.export.quantization.blocks import BlockQuantization
from starling.export.weights.weight_plan import ExpertBlocks, ExpertRows, new_weight, rows_of


def write_experts(graph: ir.Graph, node: ir.Node, how: BlockQuantization | None) -> ir.Value:
    """The node's operator, in blocks where `how` says so and they fit into the rows."""
    x, logits, up, down, up_bias, down_bias = [*node.inputs, None, None][:6]
    transposed = bool(node.attributes["transposed"].as_int())
    interleave = not node.attributes["interleaved"].as_int()
    attributes: dict[str, ir.Attr | int | float | str] = {
        "k": node.attributes["k"].as_int(),
        "activation_type": "swiglu",
        "swiglu_fusion": 1,  # gate and value alternate: the only form that the CPU knows
        "normalize_routing_weights": 1,
        "activation_alpha": node.attributes["alpha"].as_float(),
        "activation_beta": node.attributes["beta"].as_float(),
    }
    if (limit := node.attributes["limit"].as_float()) > 0:
        attributes["swiglu_limit"] = limit
    weights = [(required(up), interleave), (required(down), False)]
    biases = [
        None if bias is None else _whole(graph, bias, transposed=False, interleave=spread)
        for bias, spread in ((up_bias, interleave), (down_bias, False))
    ]
    if how is None or any(_shape(weight, transposed)[-1] % how.block_size for weight, _ in weights):
        (first, second) = (_whole(graph, w, transposed=transposed, interleave=spread) for w, spread in weights)
        moe = ir.node("MoE", [x, logits, first, biases[0], second, biases[1]], attributes=attributes, domain=MICROSOFT)
        return insert(graph, node, moe)
    attributes |= {"expert_weight_bits": how.bits, "block_size": how.block_size, "accuracy_level": how.accuracy_level}
    first_pieces, second_pieces = (_blocks(graph, w, transposed, spread, how) for w, spread in weights)
    inputs = [x, logits, *first_pieces[:2], biases[0], *second_pieces[:2], biases[1], None, None, None]
    inputs += [first_pieces[2], second_pieces[2]]
    return insert(graph, node, ir.node("QMoE", inputs, attributes=attributes, domain=MICROSOFT))


def _shape(weight: ir.Value, transposed: bool) -> tuple[int, ...]:
    """(experts, rows, columns) of a weight, (experts, rows) of a bias, as it is stored in the bundle."""
    assert weight.shape is not None
    experts, *sizes = (int(d) for d in weight.shape)  # type: ignore[arg-type]
    return (experts, *(reversed(sizes) if transposed else sizes))


def _whole(graph: ir.Graph, weight: ir.Value, *, transposed: bool, interleave: bool) -> ir.Value:
    assert weight.dtype is not None
    source = ExpertRows(rows_of(weight).names[0], transposed, interleave)
    return new_weight(graph, f"{weight.name}_experts", weight.dtype, _shape(weight, transposed), source)


def _blocks(
    graph: ir.Graph, weight: ir.Value, transposed: bool, interleave: bool, how: BlockQuantization
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Data [experts, rows, bytes], scales and zero points [experts, rows, blocks or their bytes]."""
    assert weight.dtype is not None
    experts, rows, columns = _shape(weight, transposed)
    blocks = how.blocks(columns)
    source = ExpertRows(rows_of(weight).names[0], transposed, interleave)
    pieces = (
        ("data", f"q{how.bits}", ir.DataType.UINT8, columns * how.bits // 8),
        ("scales", "scales", weight.dtype, blocks),
        ("zero_points", "zero_points", ir.DataType.UINT8, -(-blocks * how.bits // 8)),
    )
    data, scales, zeros = (
        new_weight(graph, f"{weight.name}_{suffix}", dtype, (experts, rows, width), ExpertBlocks(source, piece))
        for piece, suffix, dtype, width in pieces
    )
    return data, scales, zeros

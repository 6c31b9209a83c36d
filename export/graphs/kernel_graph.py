"""A second graph over the same weights, for the engine's own CPU kernels: few, large operators.

GroupQueryAttention becomes ours (engine/kernels). So does each MatMulNBits of the int8 and int4 that the kernels are
for, as a `starling::QuantizedLinear`, and each product with a weight of 16 bits, as a `starling::HalfLinear`. They take
in what stands around them: the RMSNorm in front, the gated activation and the residual addition after.
"""

from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common as common_passes

from starling.engine.names import LOGITS_TO_KEEP
from starling.export.graphs.float32_stream import HALVES, can_compute_in_float32, compute_in_float32
from starling.export.graphs.rewrites import STARLING, equal_shapes, insert, required, take_over
from starling.export.quantization.blocks import BITS, BlockQuantization

GRAPH_FILE = "model_kernels.onnx"
_BLOCK_SIZE, _INT8_ACTIVATIONS = 32, 4
_HEAD_DIM_STEP, _MOST_HEAD_DIM = 16, 256  # as in engine/kernels/attention/attention_kernels.h


def kernel_graph(model: ir.Model, how: BlockQuantization | None) -> ir.Model | None:
    """The graph rewritten, or None where the kernels have nothing to offer for it.

    They are for float32 between the products, and products of symmetric int8 or any int4 in blocks of 32, multiplied in
    int8; and for weights and KV cache of 16 bits: between the products is float32 then too.
    """
    caches = {_past(node).dtype for node in model.graph if node.op_type == "GroupQueryAttention"}
    if caches & set(HALVES):
        return _half_graph(model) if how is None else None
    products = [node for node in model.graph if node.op_type == "MatMulNBits"]
    takes_products = how is not None and all(_is_supported(node, how) for node in products)
    takes_attention = _takes_attention(model.graph, ir.DataType.FLOAT)
    if not takes_products and not takes_attention:
        return None
    twin = model.clone()
    graph = twin.graph
    if takes_products:
        assert how is not None
        fuse_products(graph, how)
    if takes_attention:
        # bfloat16 leaves of a score about what int8 products leave of it: mean KL is the same within its noise.
        _take_attention(graph, reduced_precision=takes_products)
    return _finished(twin)


def _half_graph(model: ir.Model) -> ir.Model | None:
    twin = model.clone()
    graph = twin.graph
    attention = [node for node in graph if node.op_type == "GroupQueryAttention"]
    kind = _past(attention[0]).dtype
    weights = {product.weights[0] for node in graph if (product := _half_product(node)) is not None}
    experts = any(node.op_type in ("MoE", "QMoE") for node in graph)
    if kind is None or not weights or experts or not can_compute_in_float32(graph):
        return None
    if not _takes_attention(graph, kind):
        return None
    weights |= {required(node.inputs[0]) for node in graph if _looks_up(node)}
    cache = {value for node in attention for value in node.outputs[1:]}
    compute_in_float32(graph, weights, cache)
    for node in list(graph):
        if node.op_type == "SkipSimplifiedLayerNormalization":
            _separate_residual(graph, node)
    for node in list(graph):
        if (product := _half_product(node)) is not None:
            _fuse(graph, product)
    # Keys and values of bfloat16 are multiplied as they are; queries and weights are rounded to it.
    _take_attention(graph, reduced_precision=kind == ir.DataType.BFLOAT16)
    return _finished(twin)


def _finished(twin: ir.Model) -> ir.Model:
    common_passes.RemoveUnusedNodesPass()(twin)
    twin.opset_imports[STARLING] = 1
    return twin


def _past(attention: ir.Node) -> ir.Value:
    return required(attention.inputs[3])


def _looks_up(node: ir.Node) -> bool:
    """Whether node reads rows of a weight of 16 bits."""
    table = node.inputs[0] if node.op_type == "Gather" else None
    return table is not None and table.is_initializer() and table.dtype in HALVES and len(table.shape or ()) == 2


@dataclass(frozen=True, slots=True)
class _Product:
    """x [..., K] times a weight; `last` is the node that gives the result, with the bias added."""

    x: ir.Value
    weights: list[ir.Value]
    bias: ir.Value | None
    last: ir.Node
    operator: str
    attributes: dict[str, Any]
    zero_points: list[ir.Value | None] = field(default_factory=list)


def _half_product(node: ir.Node) -> _Product | None:
    """The product with a weight of 16 bits that node is, as export/graphs/projections.py writes it."""
    if node.op_type not in ("MatMul", "Gemm") or not _is_half_matrix(node.inputs[1]):
        return None
    weight = required(node.inputs[1])
    rows, columns = (int(size) for size in weight.shape or ())  # type: ignore[arg-type]
    if node.op_type == "MatMul":
        attributes = {"K": rows, "N": columns, "transposed": 1}
        add = _bias_addition(node.outputs[0])
        bias = None if add is None else next(value for value in add.inputs if value is not node.outputs[0])
        return _Product(required(node.inputs[0]), [weight], bias, add or node, "HalfLinear", attributes)
    flat, whole = required(node.inputs[0]).producer(), _only_user(node.outputs[0])
    if flat is None or whole is None or not flat.op_type == whole.op_type == "Reshape":
        return None
    attributes = {"K": columns, "N": rows, "transposed": 0}
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return _Product(required(flat.inputs[0]), [weight], bias, whole, "HalfLinear", attributes)


def _is_half_matrix(weight: ir.Value | None) -> bool:
    return weight is not None and weight.is_initializer() and weight.dtype in HALVES and len(weight.shape or ()) == 2


def _bias_addition(value: ir.Value) -> ir.Node | None:
    """The addition of a vector of the graph's initializers, where nothing else uses value."""
    add = _only_user(value)
    if add is None or add.op_type != "Add":
        return None
    other = next((side for side in add.inputs if side is not value), None)
    return add if other is not None and _is_constant(other) and len(other.shape or ()) == 1 else None


def _is_constant(value: ir.Value) -> bool:
    """Whether value is an initializer, or one that was widened."""
    producer = value.producer()
    if producer is not None and producer.op_type == "Cast":
        return required(producer.inputs[0]).is_initializer()
    return value.is_initializer()


def fuse_products(graph: ir.Graph, how: BlockQuantization) -> None:
    """Make a `starling::QuantizedLinear` of each MatMulNBits in blocks of 32, with what stands around it."""
    for node in list(graph):
        if node.op_type == "SkipSimplifiedLayerNormalization":
            _separate_residual(graph, node)
    for node in list(graph):
        if node.op_type == "MatMulNBits":
            _replace(graph, node, how)


def _is_supported(node: ir.Node, how: BlockQuantization) -> bool:
    attributes = [node.attributes[name].as_int() for name in ("block_size", "accuracy_level")]
    scales, bits = node.inputs[2], node.attributes["bits"].as_int()
    is_float = scales is not None and scales.dtype == ir.DataType.FLOAT
    return attributes == [_BLOCK_SIZE, _INT8_ACTIVATIONS] and (bits == 4 or _is_symmetric(node, how)) and is_float


def _is_symmetric(node: ir.Node, how: BlockQuantization) -> bool:
    """Whether every zero point is the middle. Of another width than the scheme's are the weights kept in int8."""
    bits = node.attributes["bits"].as_int()
    return how.is_symmetric if bits == how.bits else bits == BITS["int8"]


def _takes_attention(graph: ir.Graph, kind: ir.DataType) -> bool:
    return all(_has_kernel(node, kind) for node in graph if node.op_type == "GroupQueryAttention")


def _has_kernel(attention: ir.Node, kind: ir.DataType) -> bool:
    """Heads of whole vectors, a cache of that kind, and nothing but what the kernel knows."""
    past = _past(attention)
    known = {"num_heads", "kv_num_heads", "scale", "local_window_size", "do_rotary", "rotary_interleaved"}
    if past.shape is None or past.dtype != kind or len(attention.inputs) > 9:
        return False
    head_dim = past.shape[3]
    fits = isinstance(head_dim, int) and head_dim % _HEAD_DIM_STEP == 0 and head_dim <= _MOST_HEAD_DIM
    return fits and set(attention.attributes) <= known


def _take_attention(graph: ir.Graph, *, reduced_precision: bool) -> None:
    """The same operators in our domain, with every attribute written out."""
    for node in [node for node in graph if node.op_type == "GroupQueryAttention"]:
        defaults = {"local_window_size": -1, "do_rotary": 0, "rotary_interleaved": 0}
        attributes = defaults | {name: attribute.value for name, attribute in node.attributes.items()}
        attributes["reduced_precision"] = int(reduced_precision)
        inputs = [*node.inputs, *[None] * (9 - len(node.inputs))]
        ours = ir.node("GroupQueryAttention", inputs, attributes=attributes, num_outputs=3, domain=STARLING, version=1)
        graph.insert_before(node, ours)
        for old, new in zip(node.outputs, ours.outputs, strict=True):
            take_over(old, new)
        graph.remove(node, safe=True)


def _separate_residual(graph: ir.Graph, node: ir.Node) -> None:
    """Addition and norm as two nodes, which go to the product after the one and to that in front of the other."""
    first, second, weight = node.inputs[:3]
    add = insert(graph, node, ir.node("Add", [first, second]))
    attributes = {"axis": -1, "epsilon": node.attributes["epsilon"].as_float(), "stash_type": 1}
    norm = insert(graph, node, ir.node("SimplifiedLayerNormalization", [add, weight], attributes=attributes))
    take_over(node.outputs[3], add)
    take_over(node.outputs[0], norm)
    graph.remove(node, safe=True)


def _replace(graph: ir.Graph, product: ir.Node, how: BlockQuantization) -> None:
    x, data, scales = (required(value) for value in product.inputs[:3])
    zero_points = [] if _is_symmetric(product, how) else [product.inputs[3]]
    attributes = {
        "K": product.attributes["K"].as_int(),
        "N": product.attributes["N"].as_int(),
        "bits": product.attributes["bits"].as_int(),
        "block_size": _BLOCK_SIZE,
        # The logits' own rounding costs most (a fifth of the mean KL), and costs nothing to take back: decode waits
        # for the weights, and a prompt has one position here.
        "planes": 2 if _kept_positions(x) is not None else 1,
    }
    bias = product.inputs[5] if len(product.inputs) > 5 else None
    _fuse(graph, _Product(x, [data, scales], bias, product, "QuantizedLinear", attributes, zero_points))


def _fuse(graph: ir.Graph, product: _Product) -> None:
    """Put our operator in the place of a product and what stands around it."""
    x, last, gated = product.x, product.last, False
    output = last.outputs[0]
    if (activation := _gated_activation(output)) is not None:
        output, last, gated = activation.outputs[0], activation, True
    residual = None
    if (addition := _residual_addition(output)) is not None:
        residual = next(value for value in addition.inputs if value is not output)
        output, last = addition.outputs[0], addition
    norm_weight, epsilon = None, 0.0
    if (norm := _norm_before(graph, x)) is not None:
        x, norm_weight, epsilon = norm
    linear = ir.node(
        product.operator,
        [x, *product.weights, norm_weight, product.bias, residual, *product.zero_points],
        attributes=product.attributes | {"gated": int(gated), "epsilon": epsilon},
        domain=STARLING,
        version=1,
    )
    # Where the last of the nodes stood all inputs exist, the residual's among them.
    take_over(output, insert(graph, last, linear))


def _norm_before(graph: ir.Graph, x: ir.Value) -> tuple[ir.Value, ir.Value, float] | None:
    """(input, weight, epsilon) of the norm whose result x is, or some positions of whose result it is."""
    if (kept := _kept_positions(x)) is not None:
        found = _norm_before(graph, required(kept.inputs[0]))
        if found is None:
            return None
        value, weight, epsilon = found
        # Positions are normed one by one, so those that are left can be chosen before.
        chosen = ir.node("Gather", [value, kept.inputs[1]], attributes={"axis": 1})
        chosen.outputs[0].type, chosen.outputs[0].shape = x.type, x.shape
        return insert(graph, kept, chosen), weight, epsilon
    producer = x.producer()
    if producer is None or producer.op_type != "SimplifiedLayerNormalization":
        return None
    weight, epsilon = required(producer.inputs[1]), producer.attributes["epsilon"].as_float()
    return required(producer.inputs[0]), weight, epsilon


def _kept_positions(x: ir.Value) -> ir.Node | None:
    """The node that chose the positions that get logits, where x is what it chose: x then goes into lm_head."""
    gather = x.producer()
    if gather is None or gather.op_type != "Gather" or gather.inputs[1] is None:
        return None
    return gather if gather.inputs[1].name == LOGITS_TO_KEEP else None


def _gated_activation(product: ir.Value) -> ir.Node | None:
    """The last node of silu(gate) * value, where product is [gate, value] and nothing else uses the pieces."""
    split = _only_user(product)
    if split is None or split.op_type != "Split" or len(split.outputs) != 2:
        return None
    gate, value = split.outputs
    if product.shape is None or gate.shape is None or value.shape is None:
        return None
    width = product.shape[-1]
    if not isinstance(width, int) or any(2 * int(piece.shape[-1]) != width for piece in (gate, value)):  # type: ignore[index,arg-type]
        return None
    users = [use.node for use in gate.uses()]
    sigmoid = next((node for node in users if node.op_type == "Sigmoid"), None)
    if sigmoid is None or len(users) != 2:
        return None
    silu = _only_user(sigmoid.outputs[0])
    if silu is None or silu.op_type != "Mul" or gate not in silu.inputs:
        return None
    product_of_both = _only_user(silu.outputs[0])
    if product_of_both is None or product_of_both.op_type != "Mul" or _only_user(value) is not product_of_both:
        return None
    return product_of_both


def _residual_addition(value: ir.Value) -> ir.Node | None:
    """The addition of another tensor of the same shape, where nothing else uses value."""
    add = _only_user(value)
    if add is None or add.op_type != "Add" or add.inputs[0] is add.inputs[1]:
        return None
    other = next(side for side in add.inputs if side is not value)
    return add if other is not None and equal_shapes(other, value) else None


def _only_user(value: ir.Value) -> ir.Node | None:
    uses = value.uses()
    return next(iter(uses)).node if len(uses) == 1 and not value.is_graph_output() else None

"""Rewrites of a traced graph. They see `starling::Linear` nodes, not yet matrix products."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common as common_passes
from onnxscript.optimizer import fold_constants

from starling.engine.names import SCORES
from starling.export.weights.weight_plan import new_weight, rows_of, stacked, stacked_name, weight_of

MICROSOFT = "com.microsoft"
STARLING = "starling"


def simplify(model: ir.Model) -> None:
    """Fold the constants of shape arithmetic and drop views that change nothing, copies and unused nodes."""
    with _weights_unknown(model.graph):
        fold_constants(model, onnx_shape_inference=False)
    _replace_views(model.graph)
    _merge_scalars(model.graph)
    for tidy in (
        common_passes.IdentityEliminationPass(),
        common_passes.CommonSubexpressionEliminationPass(),
        common_passes.RemoveUnusedNodesPass(),
    ):
        tidy(model)
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None


@contextmanager
def _weights_unknown(graph: ir.Graph) -> Iterator[None]:
    """Let no weight be taken for a constant: it has no bytes yet, so what is computed from it stays in the graph."""
    hidden = {v: v.const_value for v in graph.initializers.values() if weight_of(v) is not None}
    for value in hidden:
        value.const_value = None
    try:
        yield
    finally:
        for value, tensor in hidden.items():
            value.const_value = tensor


def pack_sibling_linears(model: ir.Model) -> None:
    """Projections of one input become one projection and a Split: one read of the input, one larger product."""
    graph = model.graph
    siblings: dict[tuple[ir.Value | None, bool], list[ir.Node]] = {}
    apart = routers(graph)
    for node in graph:
        if is_linear(node) and node not in apart:
            siblings.setdefault((node.inputs[0], len(node.inputs) > 2), []).append(node)
    for nodes in siblings.values():
        if len(nodes) > 1:
            _pack(graph, nodes)


def pack_attention_inputs(model: ir.Model) -> None:
    """Query, key and value that are consecutive pieces of one tensor go to GroupQueryAttention as that tensor."""
    for node in model.graph:
        if node.op_type == "GroupQueryAttention" and (packed := _common_source(node.inputs[:3])) is not None:
            node.replace_input_with(0, packed)
            node.replace_input_with(1, None)
            node.replace_input_with(2, None)
    common_passes.RemoveUnusedNodesPass()(model)


def fuse_residual_norms(model: ir.Model) -> None:
    """A residual addition and the norm of its sum become one SkipSimplifiedLayerNormalization."""
    graph = model.graph
    for norm in list(graph):
        if norm.op_type != "SimplifiedLayerNormalization":
            continue
        x, weight = required(norm.inputs[0]), norm.inputs[1]
        add = x.producer()
        if add is None or add.op_type != "Add" or not all(equal_shapes(required(i), x) for i in add.inputs):
            continue
        fused = ir.Node(
            MICROSOFT,
            "SkipSimplifiedLayerNormalization",
            [*add.inputs, weight],
            [ir.AttrFloat32("epsilon", norm.attributes["epsilon"].as_float())],
            num_outputs=4,
            name=norm.name,
        )
        for unused in fused.outputs[1:3]:  # mean and inverse deviation: a name would ask for them
            unused.name = ""
        graph.insert_before(add, fused)
        take_over(norm.outputs[0], fused.outputs[0])
        take_over(add.outputs[0], fused.outputs[3])
        graph.remove([norm], safe=True)
        graph.remove([add], safe=True)
    model.opset_imports.setdefault(MICROSOFT, 1)


def is_linear(node: ir.Node) -> bool:
    """Whether node is an abstract projection: x [..., in], weight [out, in], and perhaps bias [out]."""
    return node.domain == STARLING and node.op_type == "Linear"


def is_embedding(node: ir.Node) -> bool:
    """Whether node is an abstract embedding: token ids, and weight [vocab, hidden]."""
    return node.domain == STARLING and node.op_type == "Embedding"


def is_experts(node: ir.Node) -> bool:
    """Whether node is abstract: x [tokens, hidden], router logits, two weights with all experts, and their biases."""
    return node.domain == STARLING and node.op_type == "Experts"


def routers(graph: ir.Graph) -> set[ir.Node]:
    """The projections that choose experts: small, and their rounding would send tokens to other experts."""
    found: set[ir.Node] = set()
    seen: set[ir.Node] = set()
    waiting = [node.inputs[1] for node in graph if is_experts(node)]
    while waiting:
        value = waiting.pop()
        node = value.producer() if value is not None else None
        if node is None or node in seen:
            continue
        seen.add(node)
        if is_linear(node):
            found.add(node)
        else:
            waiting += node.inputs
    return found


def score_heads(graph: ir.Graph) -> set[ir.Node]:
    """The projection that makes scores: they are what the model is asked for, and it is small."""
    found = {value.producer() for value in graph.outputs if value.name == SCORES}
    return {node for node in found if node is not None and is_linear(node)}


def insert(graph: ir.Graph, before: ir.Node, node: ir.Node) -> ir.Value:
    """Put `node` in front of `before`; its first output."""
    graph.insert_before(before, node)
    return node.outputs[0]


def insert_constant(graph: ir.Graph, before: ir.Node, values: Sequence[int]) -> ir.Value:
    """An int64 vector as a Constant node's output."""
    node = ir.node("Constant", [], attributes={"value_ints": list(values)})
    node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
    graph.insert_before(before, node)
    return node.outputs[0]


def _merge_scalars(graph: ir.Graph) -> None:
    """Equal scalars become one, without which no two nodes that use them are seen to be the same."""
    first: dict[tuple[Any, ...], ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        constant = value.const_value
        if constant is None or constant.size != 1 or weight_of(value) is not None or value.is_graph_output():
            continue
        known = first.setdefault((value.dtype, tuple(constant.shape.numpy()), constant.tobytes()), value)
        if known is not value:
            ir.convenience.replace_all_uses_with(value, known)
            graph.initializers.pop(name)


def _pack(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    first = nodes[0]
    x = first.inputs[0]
    inputs: list[ir.Value | None] = [x]
    for index in range(1, len(first.inputs)):
        parts = [required(n.inputs[index]) for n in nodes]
        rows = [int(p.shape[0]) for p in parts]  # type: ignore[index,arg-type]
        shape = (sum(rows), *(int(d) for d in parts[0].shape[1:]))  # type: ignore[index,arg-type]
        name = stacked_name([str(p.name) for p in parts])
        dtype = parts[0].dtype
        assert dtype is not None
        inputs.append(new_weight(graph, name, dtype, shape, stacked([rows_of(p) for p in parts])))
    packed = ir.node("Linear", inputs, domain=STARLING, version=1)
    sizes = [int(n.outputs[0].shape[-1]) for n in nodes]  # type: ignore[index,arg-type]
    packed.outputs[0].type = first.outputs[0].type
    packed.outputs[0].shape = ir.Shape([*first.outputs[0].shape[:-1], sum(sizes)])  # type: ignore[index]
    graph.insert_before(first, packed)
    lengths = insert_constant(graph, first, sizes)
    split = ir.node("Split", [packed.outputs[0], lengths], attributes={"axis": -1}, num_outputs=len(nodes))
    graph.insert_before(first, split)
    for node, output in zip(nodes, split.outputs, strict=True):
        take_over(node.outputs[0], output)
        graph.remove(node, safe=True)


def _common_source(pieces: Sequence[ir.Value | None]) -> ir.Value | None:
    """The tensor whose last axis is exactly these pieces, in order."""
    found = [_piece(p) for p in pieces]
    if any(f is None for f in found):
        return None
    sources = {f[0] for f in found if f is not None}
    source = next(iter(sources))
    spans = [f[1:] for f in found if f is not None]
    follows = all(a[1] == b[0] for a, b in pairwise(spans))
    whole = spans[0][0] == 0 and source.shape is not None and spans[-1][1] == source.shape[-1]
    return source if len(sources) == 1 and follows and whole else None


def _piece(value: ir.Value | None) -> tuple[ir.Value, int, int] | None:
    """(source, start, stop) where value is source[..., start:stop] by a Split or a Slice."""
    node = value.producer() if value is not None else None
    if node is None or value is None or node.inputs[0] is None or node.inputs[0].shape is None or value.shape is None:
        return None
    source, rank = node.inputs[0], len(value.shape)
    if node.op_type == "Split" and node.attributes["axis"].as_int() in (-1, rank - 1):
        widths = [int(o.shape[-1]) for o in node.outputs]  # type: ignore[index,arg-type]
        stops = list(accumulate(widths))
        index = list(node.outputs).index(value)
        return source, stops[index] - widths[index], stops[index]
    if node.op_type == "Slice":
        start, axis, step = (_constant_int(node.inputs[i]) for i in (1, 3, 4))
        if start is not None and axis in (-1, rank - 1) and step == 1:
            return source, start, start + int(value.shape[-1])  # type: ignore[arg-type]
    return None


def _constant_int(value: ir.Value | None) -> int | None:
    constant = ir.convenience.get_const_tensor(value) if value is not None else None
    return int(constant.numpy().reshape(-1)[0]) if constant is not None and constant.size == 1 else None


def _replace_views(graph: ir.Graph) -> None:
    for node in graph:
        same = _same_tensor(node)
        if same is not None:
            take_over(node.outputs[0], same)


def _same_tensor(node: ir.Node) -> ir.Value | None:
    """An earlier value that a view (or a view of a view) merely repeats."""
    if node.op_type not in ("Reshape", "Slice", "Transpose") or node.inputs[0] is None:
        return None
    x = node.inputs[0]
    inner = x.producer()
    if node.op_type == "Transpose":
        if inner is not None and inner.op_type == "Transpose" and inner.inputs[0] is not None:
            first, second = inner.attributes["perm"].as_ints(), node.attributes["perm"].as_ints()
            if [first[axis] for axis in second] == list(range(len(first))):
                return inner.inputs[0]
        return None
    if equal_shapes(x, node.outputs[0]):
        return x
    if node.op_type == "Reshape" and inner is not None and inner.op_type == "Reshape":
        source = inner.inputs[0]
        if source is not None and equal_shapes(source, node.outputs[0]):
            return source
    return None


def equal_shapes(a: ir.Value, b: ir.Value) -> bool:
    """Whether both shapes are known, dynamic axes by name, and equal."""
    if a.shape is None or b.shape is None:
        return False
    known = all(isinstance(d, int) or d.value is not None for d in a.shape)
    return known and a.shape == b.shape


def take_over(old: ir.Value, new: ir.Value) -> None:
    """`new` is used wherever `old` was, and says what `old` said of type and shape."""
    new.type = new.type or old.type
    new.shape = new.shape or old.shape
    is_output = old.is_graph_output()
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=is_output)
    if is_output:
        old.name, new.name = f"{old.name}_replaced", old.name


def required(value: ir.Value | None) -> ir.Value:
    """`value`, which must be there."""
    assert value is not None
    return value

"""The second graph of a `tensorrt` bundle: the same nodes over the same weights, and a meaning for `TRT_Attention`.

ONNX Runtime and every other reader of the standard run this one. It is what TensorRT's plans are checked against.
"""

import onnx_ir as ir

GRAPH_FILE = "model_reference.onnx"
ATTENTION = "TRT_Attention"
#: TensorRT takes the operator in any domain; these two say which of its forms a node has.
CAUSAL, MASKED = "trt.causal", "trt.masked"
_OPSET = 24


def reference_graph(model: ir.Model) -> ir.Model:
    """A copy of a `tensorrt` graph with one model-local function for each form of `TRT_Attention` that it uses."""
    twin = model.clone()
    used = {node.domain for node in twin.graph}
    for domain in (CAUSAL, MASKED):
        if domain in used:
            function = _attention(domain)
            twin.functions[function.identifier()] = function
    return twin


def _attention(domain: str) -> ir.Function:
    """Standard Attention over query * scale, key, value, mask and the count of valid positions, int32 [batch].

    Attention aligns its causal rule with the valid positions' end, as lower_right does.
    """
    names = ("query", "key", "value", "mask", "unused", "lengths")
    query, key, value, mask, _, lengths = inputs = [ir.Value(name=name) for name in names]
    masked = domain == MASKED
    cast = ir.node("Cast", [lengths], attributes={"to": ir.DataType.INT64})
    attention = ir.node(
        "Attention",
        [query, key, value, mask if masked else None, None, None, cast.outputs[0]],
        attributes={"scale": 1.0, "is_causal": int(not masked)},
    )
    body = ir.Graph(inputs, attention.outputs, nodes=[cast, attention], opset_imports={"": _OPSET})
    causal_kind = ir.AttrString("causal_kind", "none" if masked else "lower_right")
    return ir.Function(domain, ATTENTION, graph=body, attributes=[causal_kind])

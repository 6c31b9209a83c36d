"""Which part of the decoder each node of an exported graph belongs to.

The exporter keeps the checkpoint's names on the weights ("model.layers.3.mlp.down_proj.weight_q8"), so a node with a
weight says itself what it is. A node without one belongs to what it leads to: an activation to the MLP's product after
it, a reshape to its attention, and whatever only follows the logits to the choice of the token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from starling.engine.names import LOGITS
from starling.engine.onnx_bytes import Node

EMBEDDING = "embedding"
NORM = "norm"
ATTENTION = "attention"
ATTENTION_PROJECTIONS = "attention projections"
MLP = "MLP activation"
MLP_PROJECTIONS = "MLP projections"
LM_HEAD = "lm_head"
SAMPLING = "sampling"
OTHER = "other"
#: Every part, in the order of a layer.
PARTS = (EMBEDDING, NORM, ATTENTION_PROJECTIONS, ATTENTION, MLP_PROJECTIONS, MLP, LM_HEAD, SAMPLING, OTHER)

_CONSTANTS = frozenset({"Constant", "ConstantOfShape"})
_NORMS = frozenset(
    {"SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "RMSNormalization", "LayerNormalization"}
)
_ATTENTIONS = frozenset(
    {"GroupQueryAttention", "MultiHeadAttention", "Attention", "TRT_Attention", "RotaryEmbedding", "TensorScatter"}
)
_DEQUANTIZE = "DequantizeLinear"
_GATHERS = frozenset({"Gather", "GatherBlockQuantized"})
#: What a weight's name says, in the order of asking; a layer's number stands before each.
_WEIGHTS = (
    (re.compile(r"norm|\bln_"), NORM),
    (re.compile(r"attn|attention|rotary"), ATTENTION_PROJECTIONS),
    (re.compile(r"mlp|feed_forward|ffn|expert"), MLP_PROJECTIONS),
    (re.compile(r"lm_head|embed|wte|output"), LM_HEAD),
)
#: The part of a node without weights, by the part that it leads to.
_BEFORE = {ATTENTION_PROJECTIONS: ATTENTION, MLP_PROJECTIONS: MLP}


class LayerParts:
    """The parts of a graph's nodes, for looking up what a profiler calls its kernels."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        """`nodes` in an order in which every value is written before it is read."""
        self._by_value: dict[str, str] = {}
        self._by_name = self._classify(nodes)

    def part(self, kernel: str, operator: str) -> str:
        """The part of a kernel that a profiler names, whether it is a node of the graph or was made from some.

        ONNX Runtime calls a fused node "node/…", and a cast that it puts in "InsertedPrecisionFreeCast_value".
        """
        known = self._by_name.get(kernel) or self._by_name.get(kernel.partition("/")[0])
        if known is not None:
            return known
        values = (value for value in self._by_value if kernel.endswith(f"_{value}"))
        nearest = max(values, key=len, default=None)
        if nearest is not None:
            return self._by_value[nearest]
        return NORM if operator in _NORMS else ATTENTION if operator in _ATTENTIONS else OTHER

    def _classify(self, nodes: Sequence[Node]) -> dict[str, str]:
        written = {value for node in nodes for value in node.outputs}
        stored = {
            node.outputs[0]: node.inputs[0]
            for node in nodes
            if node.operator == _DEQUANTIZE and node.inputs[0] not in written
        }
        own = {index: _own_part(node, written - stored.keys(), stored) for index, node in enumerate(nodes)}
        after_logits = {LOGITS}
        for index, node in enumerate(nodes):
            if own[index] is None and any(value in after_logits for value in node.inputs):
                own[index] = SAMPLING
                after_logits.update(node.outputs)
        wanted: dict[str, str] = {LOGITS: LM_HEAD}
        parts: dict[str, str] = {}
        for index in reversed(range(len(nodes))):
            node = nodes[index]
            part = own[index] or _first(wanted.get(value) for value in node.outputs) or OTHER
            parts[node.name] = part
            self._by_value.update(dict.fromkeys(node.outputs, part))
            leads_to = _BEFORE.get(part, part) if own[index] is not None else part
            for value in node.inputs:
                # Nodes are met from the last to the first: what reads a value first is what it is for.
                wanted[value] = leads_to
        return parts


def _own_part(node: Node, computed: set[str], stored: Mapping[str, str]) -> str | None:
    """What the node says itself: by its operator, or by the name of its weight; None where it says nothing.

    `stored` gives the weight that was dequantized to a value; `computed` are all other values that a node wrote.
    """
    if node.operator in _NORMS:
        return NORM
    if node.operator in _ATTENTIONS:
        return ATTENTION
    if node.operator in _CONSTANTS:
        return None
    weights = (stored.get(value, value) for value in node.inputs if value not in computed)
    names = [name for name in weights if "." in name]
    part = _first(next((part for pattern, part in _WEIGHTS if pattern.search(name)), None) for name in names)
    return EMBEDDING if part == LM_HEAD and node.operator in _GATHERS else part


def _first(parts: Iterable[str | None]) -> str | None:
    return next((part for part in parts if part is not None), None)

"""What the layers of a TensorRT plan were made of: their names contain those of the ONNX graph's nodes.

A layer fused from several joins them: "node_MatMul_4 + node_mul_5", "PWN(node_Sigmoid_1, node_mul_2)". A region that
TensorRT's compiler took whole is called by its ends: "{ForeignNode[node_a...node_b]}". A kernel of such a region keeps
a node's name ("node_MatMul_4_myl0_7") or has one of what it computes ("__myl_SiluMul_myl0_8"). Layers of a second
optimization profile end with " [profile 1]".
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from starling.engine.onnx_bytes import Node
from starling.profiling.operators.layer_parts import ATTENTION, MLP, MLP_PROJECTIONS, NORM, OTHER, LayerParts

#: Between the names in a layer's name. A name itself may hold single dots, slashes and pluses.
_BETWEEN = re.compile(r"[\s,()\[\]{}]+|\.{3}")
_REGION = re.compile(r"ForeignNode\[(.+?)\.\.\.(.+)\]")
_PROFILE = re.compile(r" \[profile \d+\]$")
_KERNEL = re.compile(r"^_*(?:myl_)?(.+?)_myl\d+_\d+$")
_UNNAMED = re.compile(r"\(Unnamed Layer\* \d+\) \[(\w+)\]")
_REFORMAT = "Reformatting CopyNode"
#: What takes a fused layer's time, whichever node its name begins with.
_HEAVY = frozenset({"MatMul", "Gemm", "TRT_Attention"})
#: What the name of a compiled kernel says where it holds no node.
_COMPUTES = (
    (re.compile(r"mha"), ATTENTION),
    (re.compile(r"Silu|Gelu|Sigm"), MLP),
    (re.compile(r"Mean"), NORM),
)


class TensorRTLayers:
    """Parts and operators of a plan's layers, for looking up what IProfiler reports."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        """`nodes`: those of the graph that the plan was built from, in its order."""
        known = LayerParts(nodes)
        self._nodes = nodes
        self._parts = [known.part(node.name, node.operator) for node in nodes]
        self._index = {node.name: index for index, node in enumerate(nodes)}

    def part(self, layer: str, operator: str) -> str:
        """The part of a layer: of the product or attention in it, else of the first node in its name.

        A region belongs to the part that all of it belongs to, an MLP's activation between its products to these;
        where it holds several parts it is OTHER.
        """
        region = _REGION.search(layer)
        if region is not None:
            return self._region_part(region[1], region[2])
        found = self._found(layer)
        heavy = [index for index in found if self._nodes[index].operator in _HEAVY]
        for index in heavy or found:
            return self._parts[index]
        return next((part for pattern, part in _COMPUTES if pattern.search(layer)), OTHER)

    def operator(self, layer: str) -> str:
        """What a layer computes, by the operators of its nodes ("MatMul+Mul"), else by its name without numbers."""
        if layer.startswith(_REFORMAT):
            return "Reformat"
        if _REGION.search(layer) is not None:
            return "ForeignNode"
        found = self._found(layer)
        if found:
            return "+".join(dict.fromkeys(self._nodes[index].operator for index in found))
        name = _PROFILE.sub("", layer)
        for pattern in (_KERNEL, _UNNAMED):
            match = pattern.match(name)
            if match is not None:
                return match[1]
        return re.sub(r"_?\d+", "", name)

    def _region_part(self, first: str, last: str) -> str:
        begins, ends = self._found(first), self._found(last)
        if not begins or not ends:
            return OTHER
        parts = set(self._parts[begins[0] : ends[-1] + 1]) - {OTHER}
        if parts == {MLP_PROJECTIONS, MLP}:
            return MLP_PROJECTIONS
        return parts.pop() if len(parts) == 1 else OTHER

    def _found(self, text: str) -> list[int]:
        """The nodes named in `text`, each once, in the order of their names there."""
        found = (self._lookup(name) for name in _BETWEEN.split(text))
        return list(dict.fromkeys(index for index in found if index is not None))

    def _lookup(self, name: str) -> int | None:
        """The node called `name`, or whose name TensorRT made it of by adding "_…" to the end."""
        while name:
            if name in self._index:
                return self._index[name]
            name = name.rpartition("_")[0]
        return None

"""Which weights of a graph are quantized in blocks with how many bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from starling.engine.names import LOGITS
from starling.export.graphs.rewrites import is_embedding, is_linear, required
from starling.export.quantization.blocks import BlockQuantization
from starling.export.weights.weight_plan import rows_of


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """As `how` says, but for the checkpoint's tensors in `eight_bits`, which get 8 bits a weight."""

    how: BlockQuantization
    eight_bits: frozenset[str] = frozenset()

    def of(self, names: Sequence[str]) -> BlockQuantization:
        """How the weight that is packed from these tensors is quantized."""
        return self.how.at(8) if self.eight_bits.intersection(names) else self.how


def plan_blocks(graph: ir.Graph, how: BlockQuantization) -> BlockPlan:
    """The plan of a traced graph: lm_head and the embedding get 8 bits.

    Mean KL on SmolLM2 is then 0.1 lower than with 4 bits there, and the same as with full precision there.
    """
    tables = [node.inputs[1] for node in graph if is_embedding(node)]
    if any(value.name == LOGITS for value in graph.outputs):
        tables.append([node for node in graph if is_linear(node)][-1].inputs[1])
    return BlockPlan(how, frozenset(name for table in tables for name in rows_of(table).names))


def packed_projections(graph: ir.Graph, plan: BlockPlan) -> dict[tuple[str, ...], int]:
    """The tensors of each projection of a traced graph that has fewer than 8 bits, and how many weights they have."""
    found = {}
    for node in graph:
        if is_linear(node):
            weight = required(node.inputs[1])
            names = rows_of(weight).names
            if plan.of(names).bits < 8 and weight.shape is not None:
                found[names] = math.prod(weight.shape.numpy())
    return found

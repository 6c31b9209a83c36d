"""SmoothQuant (Xiao et al., 2023): move the range of outlying input channels from activations into weights.

A projection's input channel j is divided by s_j and its weights' column j multiplied by it: the product is the same.
The division costs nothing where whatever makes the input can take it in: a norm's weight, or the rows of a projection
that the input is a product with. Where nothing can, it is a Mul in the graph. All of it is read off the graph.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from starling.export.checkpoints.checkpoint import TensorSource
from starling.export.graphs.rewrites import is_linear
from starling.export.weights.weight_plan import Rows, rows_of, weight_of

_NORMS = ("RMSNormalization", "SimplifiedLayerNormalization")
#: How much smaller than the greatest a factor may be: beyond, float16 would lose the channel.
_RANGE = 2.0**12


@dataclass(frozen=True, slots=True)
class InputGroup:
    """Projections that read one tensor.

    `projections` holds of each the names of the checkpoint's tensors that its weight is packed from; `makers` the
    tensors whose rows can take in the division: a norm's weight, or a projection's weight and bias. `shared`: a tensor
    serves elsewhere too (a tied embedding), so its columns may not be multiplied.
    """

    projections: tuple[tuple[str, ...], ...]
    makers: tuple[str, ...]
    shared: bool

    @property
    def tensors(self) -> tuple[str, ...]:
        """The checkpoint's tensors behind all of the projections."""
        return tuple(name for names in self.projections for name in names)


def input_groups(model: ir.Model) -> list[InputGroup]:
    """The groups of a traced graph's `starling::Linear` nodes, in graph order; the last one is lm_head's."""
    readers: dict[ir.Value, list[ir.Node]] = {}
    for node in model.graph:
        if is_linear(node) and node.inputs[0] is not None:
            readers.setdefault(node.inputs[0], []).append(node)
    uses = _tensor_uses(model)
    return [_group(x, nodes, uses) for x, nodes in readers.items()]


def smoothing_factors(input_absmax: Tensor, weight_absmax: Tensor, alpha: float) -> Tensor:
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), float32 [columns], scaled so that the greatest |X_j| / s_j is 1.

    `input_absmax`, `weight_absmax`: [columns]. Scaling all of s changes no rounding, since every output channel has a
    scale of its own. Channels that are (nearly) always zero get the smallest factor that float16 can carry.
    """
    tiny = 1e-8
    factors = input_absmax.float().clamp(min=tiny) ** alpha / weight_absmax.float().clamp(min=tiny) ** (1 - alpha)
    factors = factors.clamp(min=factors.max() / _RANGE)
    top = (input_absmax.float() / factors).max()
    return factors * top.clamp(min=tiny)


class SmoothedTensors:
    """The checkpoint's tensors with factors in place: a TensorSource, float32 where something is changed."""

    def __init__(
        self, tensors: TensorSource, row_divisors: Mapping[str, Tensor], column_factors: Mapping[str, Tensor]
    ) -> None:
        self._tensors, self._divisors, self._factors = tensors, row_divisors, column_factors

    def names(self) -> Collection[str]:
        """See TensorSource."""
        return self._tensors.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """See TensorSource."""
        return self._tensors.shape(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See TensorSource."""
        rows = self._tensors.rows(name, start, stop)
        if name in self._divisors:
            divisors = self._divisors[name][start:stop]
            rows = rows.float() / (divisors if rows.ndim == 1 else divisors[:, None])
        if name in self._factors:
            rows = rows.float() * self._factors[name]
        return rows


def column_absmax(tensors: TensorSource, names: tuple[str, ...], step: int = 4096) -> Tensor:
    """The greatest absolute weight per input channel over all of `names` [rows, columns]; float32 [columns]."""
    found = torch.zeros(tensors.shape(names[0])[1])
    for name in names:
        for start in range(0, tensors.shape(name)[0], step):
            rows = tensors.rows(name, start, min(start + step, tensors.shape(name)[0]))
            found = torch.maximum(found, rows.float().abs().amax(dim=0))
    return found


def _tensor_uses(model: ir.Model) -> Counter[str]:
    """How many nodes read each of the checkpoint's tensors."""
    uses: Counter[str] = Counter()
    for value in model.graph.initializers.values():
        weight = weight_of(value)
        if isinstance(weight, Rows):
            uses.update(dict.fromkeys(weight.names, len(list(value.uses()))))
    return uses


def _group(x: ir.Value, nodes: list[ir.Node], uses: Counter[str]) -> InputGroup:
    projections = tuple(rows_of(node.inputs[1]).names for node in nodes)
    only_here = len(list(x.uses())) == len(nodes) and not x.is_graph_output()
    shared = any(uses[name] > 1 for names in projections for name in names)
    return InputGroup(projections, _makers(x, uses) if only_here and not shared else (), shared)


def _makers(x: ir.Value, uses: Counter[str]) -> tuple[str, ...]:
    """The tensors whose rows are x's channels, where all that they make goes into x; none where there are no such."""
    node = x.producer()
    names: tuple[str, ...] = ()
    if node is not None and node.op_type in _NORMS and isinstance(weight := weight_of(node.inputs[1]), Rows):
        names = () if weight.plus else weight.names  # what is divided is the tensor, before anything is added to it
    elif node is not None and node.op_type == "Mul":
        names = next((found for value in node.inputs if (found := _linear_behind(value))), ())
    return names if all(uses[name] == 1 for name in names) else ()


def _linear_behind(value: ir.Value | None) -> tuple[str, ...]:
    """Weight and bias of the projection, perhaps one of a packed one's, that makes `value` for one reader only."""
    node = value.producer() if value is not None else None
    if value is None or node is None or len(list(value.uses())) != 1:
        return ()
    if is_linear(node):
        return tuple(name for part in node.inputs[1:] for name in rows_of(part).names)
    packed = node.inputs[0].producer() if node.op_type == "Split" and node.inputs[0] is not None else None
    if packed is None or not is_linear(packed) or len(list(packed.outputs[0].uses())) != 1:
        return ()
    parts = [rows_of(part).names for part in packed.inputs[1:]]
    if any(len(names) != len(node.outputs) for names in parts):  # a split of the model's own, inside a tensor
        return ()
    return tuple(names[list(node.outputs).index(value)] for names in parts)

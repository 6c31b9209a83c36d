"""Projections with explicit QuantizeLinear/DequantizeLinear, in the forms that TensorRT fuses into its own kernels."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from torch import Tensor

from starling.export.quantization.qdq_scheme import Grid
from starling.export.quantization.qdq_settings import QdqQuantization
from starling.export.weights.weight_plan import QdqRows, Rows, Table, new_weight, rows_of


@dataclass(frozen=True, slots=True)
class InputPlan:
    """What happens to a projection's input: `multiplier` [columns] if any, then rounding with one scale."""

    scale: float
    multiplier: Tensor | None = None


@dataclass(frozen=True, slots=True)
class QdqPlan:
    """How each projection of one graph is written, by the names of the checkpoint's tensors behind its weight.

    `kept` stay in the model's dtype; `inputs` is empty where activations are not quantized.
    """

    how: QdqQuantization
    kept: frozenset[str] = frozenset()
    inputs: Mapping[str, InputPlan] = field(default_factory=dict)


class QdqWriter:
    """Writes the projections of one graph; what several of them read is quantized once."""

    def __init__(self, graph: ir.Graph, plan: QdqPlan) -> None:
        self._graph, self._plan = graph, plan
        self._multiplied: dict[tuple[ir.Value, int], ir.Value] = {}
        self._rounded: dict[tuple[ir.Value, float], ir.Value] = {}

    def input(self, node: ir.Node) -> ir.Value:
        """The projection's input, multiplied where the plan says so, whether or not the projection is quantized."""
        x, weight = node.inputs[0], node.inputs[1]
        assert x is not None
        assert weight is not None
        plan = self._plan.inputs.get(_first_tensor(node))
        if plan is None or plan.multiplier is None:
            return x
        key = (x, id(plan.multiplier))
        if key not in self._multiplied:
            name, dtype = f"{weight.name}_smoothing", _dtype(weight)
            factor = new_weight(self._graph, name, dtype, tuple(plan.multiplier.shape), Table(plan.multiplier))
            self._multiplied[key] = self._insert(node, ir.node("Mul", [x, factor]))
        return self._multiplied[key]

    def linear(self, node: ir.Node) -> ir.Value:
        """MatMul of the (rounded) input and DequantizeLinear of the weight [in, out], and the bias after it."""
        weight = node.inputs[1]
        assert weight is not None
        x = self.input(node)
        grid, plan = self._plan.how.activations, self._plan.inputs.get(_first_tensor(node))
        if grid is not None:
            assert plan is not None
            x = self._round(node, x, plan.scale, grid)
        product = self._insert(node, ir.node("MatMul", [x, self._weight(node, weight)]))
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        return product if bias is None else self._insert(node, ir.node("Add", [product, bias]))

    def is_quantized(self, node: ir.Node) -> bool:
        """Whether the plan quantizes this projection."""
        return _first_tensor(node) not in self._plan.kept

    def _round(self, node: ir.Node, x: ir.Value, scale: float, grid: Grid) -> ir.Value:
        key = (x, scale)
        if key not in self._rounded:
            weight = node.inputs[1]
            assert weight is not None
            scales = self._constant(f"{weight.name}_input_scale", _dtype(weight), scale)
            zero = self._constant(f"zero_{grid.stored.name.lower()}", grid.stored, 0.0)
            rounded = self._insert(node, ir.node("QuantizeLinear", [x, scales, zero]))
            self._rounded[key] = self._insert(node, ir.node("DequantizeLinear", [rounded, scales, zero]))
        return self._rounded[key]

    def _weight(self, node: ir.Node, weight: ir.Value) -> ir.Value:
        assert weight.shape is not None
        rows, columns = (int(d) for d in weight.shape)  # type: ignore[arg-type]
        grid, block = self._plan.how.weights, self._plan.how.block_for(columns)
        source = Rows(rows_of(weight).names)
        name = f"{weight.name}_{grid.stored.name.lower()}"
        data = new_weight(self._graph, name, grid.stored, (columns, rows), QdqRows(source, "data", block))
        shape = (rows,) if block is None else (columns // block, rows)
        scales = new_weight(
            self._graph, f"{weight.name}_scales", _dtype(weight), shape, QdqRows(source, "scales", block)
        )
        attributes = {"axis": 1} if block is None else {"axis": 0, "block_size": block}
        return self._insert(node, ir.node("DequantizeLinear", [data, scales], attributes=attributes))

    def _constant(self, name: str, dtype: ir.DataType, value: float) -> ir.Value:
        if name not in self._graph.initializers:
            tensor = ir.tensor(np.array(value, dtype=dtype.numpy()), dtype=dtype, name=name)
            self._graph.register_initializer(ir.Value(name=name, const_value=tensor))
        return self._graph.initializers[name]

    def _insert(self, before: ir.Node, node: ir.Node) -> ir.Value:
        self._graph.insert_before(before, node)
        return node.outputs[0]


def _first_tensor(node: ir.Node) -> str:
    return rows_of(node.inputs[1]).names[0]


def _dtype(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None
    return value.dtype

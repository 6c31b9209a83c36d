"""Weights as a plan: what each initializer of the graph is made of, before any of its bytes exists."""

from dataclasses import dataclass, replace

import onnx_ir as ir
from torch import Tensor

_META = "starling.weight"


@dataclass(frozen=True, slots=True)
class Rows:
    """Checkpoint tensors [rows_i, columns] (or [rows_i]), one below another; `transposed` stores [columns, rows].

    `plus` is added to every value: the 1 of a norm that computes with 1 + weight.
    """

    names: tuple[str, ...]
    transposed: bool = False
    plus: float = 0.0


@dataclass(frozen=True, slots=True)
class Blocks:
    """One piece (`data`, `scales` or `zero_points`) of rows that are quantized in blocks along their columns."""

    rows: Rows
    piece: str


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """A checkpoint tensor with all experts of a layer, [experts, rows, columns], or their biases, [experts, rows].

    `transposed`: the checkpoint has [experts, columns, rows]. `interleave`: its first and second half of the rows are
    stored in turns.
    """

    name: str
    transposed: bool
    interleave: bool


@dataclass(frozen=True, slots=True)
class ExpertBlocks:
    """One piece (`data`, `scales` or `zero_points`) of experts that are quantized in blocks along their columns."""

    rows: ExpertRows
    piece: str


@dataclass(frozen=True, slots=True)
class QdqRows:
    """One piece (`data` or `scales`) of rows that are quantized for DequantizeLinear and stored [columns, rows].

    `block` None: one scale per row, else one per so many columns of it.
    """

    rows: Rows
    piece: str
    block: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Numbers that no checkpoint holds, float32: a rotary table, the factors of smoothed inputs."""

    values: Tensor


Weight = Rows | Blocks | ExpertRows | ExpertBlocks | QdqRows | Table


def set_weight(value: ir.Value, weight: Weight) -> None:
    """Say what `value`, an initializer, is made of."""
    value.meta[_META] = weight


def weight_of(value: ir.Value | None) -> Weight | None:
    """What `value` is made of; None if it is not a planned weight."""
    return None if value is None else value.meta.get(_META)


def rows_of(value: ir.Value | None) -> Rows:
    """The checkpoint rows behind `value`, which must be a weight as the model wrote it."""
    weight = weight_of(value)
    if not isinstance(weight, Rows):
        raise TypeError(f"{value} is not made of checkpoint rows")
    return weight


def new_weight(graph: ir.Graph, name: str, dtype: ir.DataType, shape: tuple[int, ...], weight: Weight) -> ir.Value:
    """An initializer of `graph` made of `weight`; the existing one if its name is taken by the same weight."""
    if name in graph.initializers:
        value = graph.initializers[name]
        if weight_of(value) != weight:
            raise ValueError(f"two different weights are named {name}")
        return value
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
    value.const_value = ir.LazyTensor(_unwritten, dtype=dtype, shape=ir.Shape(shape), name=name)
    set_weight(value, weight)
    graph.register_initializer(value)
    return value


def stacked(rows: list[Rows]) -> Rows:
    """All of them, one below another."""
    return replace(rows[0], names=tuple(name for r in rows for name in r.names))


def stacked_name(names: list[str]) -> str:
    """A name for weights packed into one: `0.q_proj.weight` and `0.k_proj.weight` give `0.q_proj+k_proj.weight`."""
    parts = [name.split(".") for name in names]
    if len({len(part) for part in parts}) > 1:
        return "+".join(names)
    columns = (dict.fromkeys(column) for column in zip(*parts, strict=True))
    return ".".join("+".join(column) for column in columns)


def _unwritten() -> ir.TensorProtocol:
    raise RuntimeError("this weight has not been written yet")

"""Weights as a plan: what each initializer of the graph is made of, before any of its bytes exists, and its size."""

import math
from dataclasses import dataclass, replace

import onnx_ir as ir
import torch
from torch import Tensor

from starling.export.checkpoints.checkpoint import TensorSource

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


def distinct_weights(model: ir.Model) -> dict[Weight, ir.Value]:
    """One initializer per different weight, in graph order: what is tied is written once."""
    found: dict[Weight, ir.Value] = {}
    for value in model.graph.initializers.values():
        if (weight := weight_of(value)) is not None:
            found.setdefault(weight, value)
    return found


def planned_bytes(model: ir.Model) -> int:
    """Bytes of all planned weights, each counted once."""
    return sum(_weight_bytes(value) for value in distinct_weights(model).values())


def bytes_per_token(model: ir.Model) -> int:
    """Weight bytes that one decoded token reads: all but rotary tables and an embedding that nothing else reads.

    Of a mixture's experts it reads those that it chose.
    """
    read: dict[Weight, int] = {}
    for value in model.graph.initializers.values():
        weight = weight_of(value)
        looked_up = all(node.op_type in ("Gather", "GatherBlockQuantized") for node in _readers(value))
        if weight is not None and not isinstance(weight, Table) and not looked_up:
            read[weight] = int(_weight_bytes(value) * _share(value))
    return sum(read.values())


def bits_per_weight(model: ir.Model, tensors: TensorSource) -> float:
    """Bits of a weight in blocks, scales and zero points among them; the mean over all such weights."""
    stored, weights = 0, 0
    for weight, value in distinct_weights(model).items():
        if isinstance(weight, Blocks | ExpertBlocks):
            stored += _weight_bytes(value)
            names = weight.rows.names if isinstance(weight, Blocks) else (weight.rows.name,)
            weights += sum(math.prod(tensors.shape(name)) for name in names) if weight.piece == "data" else 0
    return round(8 * stored / max(weights, 1), 3)


def _share(value: ir.Value) -> float:
    """The share of a weight that one token reads: of experts the chosen ones, else all of it."""
    users = [node for node in _readers(value) if node.op_type in ("MoE", "QMoE")]
    return users[0].attributes["k"].as_int() / int(shape_of(value).numpy()[0]) if users else 1.0


def _readers(value: ir.Value) -> list[ir.Node]:
    """What reads a weight, be it in another type."""
    nodes = [use.node for use in value.uses()]
    return [reader for node in nodes for reader in (_readers(node.outputs[0]) if node.op_type == "Cast" else [node])]


def dtype_of(value: ir.Value) -> ir.DataType:
    """The type that a weight is stored in."""
    assert value.dtype is not None
    return value.dtype


def shape_of(value: ir.Value) -> ir.Shape:
    """The shape that a weight is stored in."""
    assert value.shape is not None
    return value.shape


def _weight_bytes(value: ir.Value) -> int:
    return math.ceil(torch.Size(shape_of(value).numpy()).numel() * dtype_of(value).itemsize)


def _unwritten() -> ir.TensorProtocol:
    raise RuntimeError("this weight has not been written yet")

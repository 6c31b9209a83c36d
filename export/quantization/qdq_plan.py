"""Decide how every projection of a traced graph is quantized: scales, smoothing, and what stays in high precision."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import onnx_ir as ir
from torch import Tensor

from starling.engine.errors import UserError
from starling.engine.names import EMBEDDINGS
from starling.export.checkpoints.checkpoint import TensorSource
from starling.export.quantization.qdq_projections import InputPlan, QdqPlan
from starling.export.quantization.qdq_settings import QdqQuantization
from starling.export.quantization.smoothquant import (
    InputGroup,
    SmoothedTensors,
    column_absmax,
    input_groups,
    smoothing_factors,
)


@dataclass(frozen=True, slots=True)
class PreparedWeights:
    """A plan, and the checkpoint's tensors with the plan's smoothing in them."""

    plan: QdqPlan
    tensors: TensorSource


def projection_groups(model: ir.Model, how: QdqQuantization) -> list[InputGroup]:
    """The groups of projections to be quantized, in graph order; the head's only where it is asked for."""
    groups = input_groups(model)
    has_head = not any(output.name == EMBEDDINGS for output in model.graph.outputs)
    return groups[:-1] if has_head and not how.head else groups


def kept_by_pattern(model: ir.Model, how: QdqQuantization) -> frozenset[str]:
    """The tensors that stay in the model's dtype whatever calibration finds: lm_head's, and those of `how.keep`.

    Projections that are packed into one are kept together. Raises UserError for a pattern that fits no projection.
    """
    every = [names for group in input_groups(model) for names in group.projections]
    kept = {name for names in every for name in names} - names_of(projection_groups(model, how))
    for pattern in how.keep or ():
        fitting = [names for names in every if any(fnmatchcase(name, pattern) for name in names)]
        if not fitting:
            examples = f"{every[0][0]} or {every[-2][0]}"
            raise UserError(f"no projection is called {pattern!r}; they are called such as {examples}")
        kept |= {name for names in fitting for name in names}
    return frozenset(kept)


def plan_weights(how: QdqQuantization, kept: frozenset[str], tensors: TensorSource) -> PreparedWeights:
    """The plan where activations are not quantized."""
    return PreparedWeights(QdqPlan(how, kept), tensors)


def plan_activations(
    groups: Sequence[InputGroup],
    how: QdqQuantization,
    kept: frozenset[str],
    tensors: TensorSource,
    absmax: Mapping[str, Tensor],
) -> PreparedWeights:
    """The plan where activations are quantized; `absmax` is what `calibration.input_absmax` found.

    A group whose projections are all kept is not smoothed.
    """
    assert how.activations is not None
    inputs: dict[str, InputPlan] = {}
    divisors: dict[str, Tensor] = {}
    factors: dict[str, Tensor] = {}
    for group in groups:
        if kept.issuperset(group.tensors):
            continue
        seen = absmax[group.tensors[0]]
        multiplier = None
        if how.smoothing and not group.shared:
            factor = smoothing_factors(seen, column_absmax(tensors, group.tensors), how.smoothing)
            seen = seen / factor
            factors |= dict.fromkeys(group.tensors, factor)
            divisors |= dict.fromkeys(group.makers, factor)
            multiplier = None if group.makers else 1 / factor
        scale = max(float(seen.max()) / how.activations.top, 1e-7)
        inputs |= dict.fromkeys(group.tensors, InputPlan(scale, multiplier))
    return PreparedWeights(QdqPlan(how, kept, inputs), SmoothedTensors(tensors, divisors, factors))


def names_of(groups: Collection[InputGroup]) -> set[str]:
    """The checkpoint's tensors behind all these groups."""
    return {name for group in groups for name in group.tensors}

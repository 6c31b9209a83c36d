"""From a traced graph and its checkpoint to a Q/DQ plan: calibrate, smooth, choose what stays in high precision."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from starling.engine.bundle.model_records import Architecture
from starling.engine.host import available_memory
from starling.engine.progress import Progress
from starling.export.check.sample_texts import CALIBRATION, TextEncoder, TokenRows, calibration_rows
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.graphs.rewrites import is_linear
from starling.export.quantization.calibration import input_absmax
from starling.export.quantization.calibration_choice import Calibration
from starling.export.quantization.precision_choice import choose_kept, judged_rows
from starling.export.quantization.qdq_plan import (
    PreparedWeights,
    kept_by_pattern,
    names_of,
    plan_activations,
    plan_weights,
    projection_groups,
)
from starling.export.quantization.qdq_scheme import MAX_MEAN_KL
from starling.export.quantization.qdq_settings import QdqQuantization
from starling.export.quantization.simulation import Simulation
from starling.export.weights.weight_plan import rows_of

#: The choice aims lower than the bound: it sees the text that the scales were made for, and no float16.
_TARGET = 0.7 * MAX_MEAN_KL
#: Beyond, trying each projection takes hours on a CPU; --keep-precision says it by hand.
_MOST_PARAMETERS = 2_000_000_000


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the weights are written from, what bundle.json says of it, and what the user sees."""

    weights: PreparedWeights
    report: dict[str, Any]
    notes: tuple[str, ...]


def prepare(
    model: ir.Model,
    arch: Architecture,
    checkpoint: Checkpoint,
    folder: Path,
    how: QdqQuantization,
    calibration: Calibration,
    progress: Progress,
) -> Prepared:
    """The plan for the traced `model`. `folder` holds the tokenizer.

    Raises:
        UserError: the calibration text cannot be used, a pattern fits nothing, or no block fits a weight.
    """
    kept = kept_by_pattern(model, how)
    if how.activations is None:
        weights = plan_weights(how, kept, checkpoint.tensors)
        return _prepared(weights, how, _in_order(model, kept, how), None, _block_notes(model, how, kept))
    calibration.require(how.scheme)
    rows = calibration_rows(
        calibration.file or CALIBRATION,
        TextEncoder(folder, arch.vocab_size),
        calibration.tokens,
        arch.max_positions,
    )
    progress.phase(f"calibrating on {rows.tokens} tokens")
    absmax = input_absmax(checkpoint.config, checkpoint.tensors, rows, progress.bytes)
    groups = projection_groups(model, how)
    weights = plan_activations(groups, how, kept, checkpoint.tensors, absmax)
    notes: tuple[str, ...] = ()
    if how.keep is None:
        if arch.parameters > _MOST_PARAMETERS or 4 * arch.parameters * 2 > available_memory():
            notes = ("every projection is quantized: the model is too large to try which ones cost most",)
        else:
            progress.phase("choosing what stays in high precision")
            with Simulation(checkpoint.config, weights.tensors, weights.plan) as simulation:
                chosen = choose_kept(simulation, groups, judged_rows(rows), _TARGET)
            kept |= names_of(chosen)
            weights = plan_activations(groups, how, kept, checkpoint.tensors, absmax)
    return _prepared(weights, how, _in_order(model, kept, how), _told(calibration.name, rows), notes)


def _told(name: str, rows: TokenRows) -> dict[str, Any]:
    return {"text": name, "tokens": rows.tokens, "rows": len(rows.lengths)}


def _prepared(
    weights: PreparedWeights,
    how: QdqQuantization,
    kept: tuple[str, ...],
    calibration: dict[str, Any] | None,
    notes: tuple[str, ...],
) -> Prepared:
    return Prepared(weights, how.to_json() | {"kept": list(kept), "calibration": calibration}, notes)


def _in_order(model: ir.Model, kept: frozenset[str], how: QdqQuantization) -> tuple[str, ...]:
    """What stays in high precision beside what always does, in graph order."""
    always = kept_by_pattern(model, replace(how, keep=None))
    every = [name for group in projection_groups(model, replace(how, head=True)) for name in group.tensors]
    return tuple(name for name in every if name in kept - always)


def _block_notes(model: ir.Model, how: QdqQuantization, kept: frozenset[str]) -> tuple[str, ...]:
    """Which widths get smaller blocks than were asked for."""
    if how.block_size is None:
        return ()
    widths = {
        int(node.inputs[1].shape[1])  # type: ignore[index,arg-type,union-attr]
        for node in model.graph
        if is_linear(node) and rows_of(node.inputs[1]).names[0] not in kept
    }
    return tuple(
        f"blocks of {how.block_for(width)} where weights are {width} wide: {how.block_size} does not divide it"
        for width in sorted(widths)
        if how.block_for(width) != how.block_size
    )

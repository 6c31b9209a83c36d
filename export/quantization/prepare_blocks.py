"""From a graph that is to be in blocks to its quantized weights: calibrate, or leave it to rounding."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx_ir as ir

from starling.engine.bundle.model_records import Architecture
from starling.engine.errors import UserError
from starling.engine.progress import Progress
from starling.export.check.sample_texts import CALIBRATION, TextEncoder, TokenRows, calibration_rows
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.quantization.bit_budget import JUDGED_TOKENS, RoundingCosts, choose_eight_bits
from starling.export.quantization.block_calibration import LEAST_EXPERT_TOKENS, BlockCalibration
from starling.export.quantization.block_plan import BlockPlan, packed_projections
from starling.export.quantization.block_store import BlockStore
from starling.export.quantization.blocks import BlockQuantization
from starling.export.quantization.calibration_choice import Calibration
from starling.export.quantization.gptq import DAMPING
from starling.export.quantization.stored_blocks import StoredBlocks
from starling.export.weights.weight_plan import Blocks, ExpertBlocks, weight_of


@dataclass(frozen=True, slots=True)
class CalibratedBlocks:
    """What calibration quantized (None: nothing), what bundle.json says of it, and what the user sees."""

    store: BlockStore | None
    report: dict[str, Any] | None
    notes: tuple[str, ...]


def with_mean_bits(
    model: ir.Model,
    arch: Architecture,
    checkpoint: Checkpoint,
    folder: Path,
    plan: BlockPlan,
    calibration: Calibration,
    progress: Progress,
) -> BlockPlan:
    """The plan of a traced graph with 8 bits for the projections that cost most, as many as `mean_bits` has room for.

    `folder` holds the tokenizer.

    Raises:
        UserError: there is no calibration, or its text cannot be used.
    """
    if plan.how.mean_bits is None:
        return plan
    if calibration.is_off:
        raise UserError("--bits chooses by a text which projections get 8 bits: leave out --calibration none")
    tokens = min(calibration.tokens, JUDGED_TOKENS)
    encoder = TextEncoder(folder, arch.vocab_size)
    rows = calibration_rows(calibration.file or CALIBRATION, encoder, tokens, arch.max_positions)
    units = packed_projections(model.graph, plan)
    progress.phase(f"judging {len(units)} projections on {rows.tokens} tokens")
    costs = RoundingCosts((name for unit in units for name in unit), plan.how, rows)
    found = costs.run(checkpoint.config, checkpoint.tensors, progress.bytes)
    return replace(plan, eight_bits=plan.eight_bits | choose_eight_bits(units, found, plan.how.mean_bits))


def wants_calibration(
    graph: ir.Graph,
    checkpoint: Checkpoint,
    plan: BlockPlan,
    stored: StoredBlocks | None,
    calibration: Calibration,
) -> bool:
    """Whether calibration makes some of the weights of 4 bits better: random ones are rounded, if no text is given.

    What is taken as it is stored is not quantized at all.
    """
    random = checkpoint.kind == "random" and calibration.file is None
    if random or calibration.is_off:
        return False
    return any(how.bits == 4 for how in _wanted(graph, plan, stored).values())


@contextmanager
def calibrated_blocks(
    model: ir.Model,
    arch: Architecture,
    checkpoint: Checkpoint,
    folder: Path,
    plan: BlockPlan,
    stored: StoredBlocks | None,
    calibration: Calibration,
    progress: Progress,
) -> Iterator[CalibratedBlocks]:
    """Quantize what `plan` gives 4 bits in the `model` with the weights planned; on disk while the block runs.

    `folder` holds the tokenizer, and gets a temporary folder.

    Raises:
        UserError: the calibration text cannot be used.
    """
    file = calibration.file or CALIBRATION
    rows = calibration_rows(file, TextEncoder(folder, arch.vocab_size), calibration.tokens, arch.max_positions)
    progress.phase(f"quantizing on {rows.tokens} tokens")
    with TemporaryDirectory(dir=folder) as scratch:
        store = BlockStore(Path(scratch))
        run = BlockCalibration(rows, _wanted(model.graph, plan, stored), store)
        run.run(checkpoint.config, checkpoint.tensors, progress.bytes)
        yield CalibratedBlocks(store, _report(calibration.name, file, rows), tuple(_notes(run.rounded_experts)))


def _wanted(graph: ir.Graph, plan: BlockPlan, stored: StoredBlocks | None) -> dict[str, BlockQuantization]:
    """How each of the checkpoint's tensors that goes into blocks is quantized; not what is taken as it is stored."""
    found: dict[str, BlockQuantization] = {}
    for value in graph.initializers.values():
        weight = weight_of(value)
        if isinstance(weight, Blocks):
            found |= dict.fromkeys(weight.rows.names, plan.of(weight.rows.names))
        elif isinstance(weight, ExpertBlocks):
            found[weight.rows.name] = plan.how
    taken = {} if stored is None else stored.grids
    return {name: how for name, how in found.items() if name not in taken}


def _report(name: str, file: Path, rows: TokenRows) -> dict[str, Any]:
    return {
        "text": name,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "tokens": rows.tokens,
        "rows": len(rows.lengths),
        "damping": DAMPING,
    }


def _notes(rounded_experts: int) -> Iterator[str]:
    if rounded_experts:
        yield (
            f"{rounded_experts} experts were rounded alone: fewer than {LEAST_EXPERT_TOKENS} tokens of the calibration "
            "were sent to each (--calibration-tokens, --calibration FILE)"
        )

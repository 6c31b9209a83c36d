"""What reaches which quality with INT8 activations: smoothing strength, narrower scales, projections kept out.

    python -m starling.profiling.quality.w8a8_sweep demo sweep.json

Every trial is the PyTorch twin of the Q/DQ graph (float32 beside the rounding) on the held-out text; lm_head stays in
high precision. The file holds one record per trial: settings, mean and max KL in nats, top-1 agreement.
"""

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from starling.export.bundle_folder import write_tokenizer
from starling.export.check.bundle_quality import HELD_OUT_TOKENS
from starling.export.check.sample_texts import CALIBRATION, TextEncoder, TokenRows, calibration_rows, held_out_rows
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.checkpoints.model_source import open_checkpoint
from starling.export.dialects import DIALECTS
from starling.export.quantization.calibration import input_absmax
from starling.export.quantization.calibration_choice import DEFAULT_TOKENS
from starling.export.quantization.precision_choice import judged_rows, rank_groups
from starling.export.quantization.qdq_plan import (
    PreparedWeights,
    kept_by_pattern,
    names_of,
    plan_activations,
    projection_groups,
)
from starling.export.quantization.qdq_settings import QdqQuantization
from starling.export.quantization.simulation import Simulation
from starling.export.quantization.smoothquant import InputGroup
from starling.export.tracing.tracer import trace

PARTS = ("smoothing", "clipping", "kept")
_SMOOTHING = (0.0, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 1.0)
_CLIPPING = (0.9, 0.7, 0.5)
_KEPT = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24)
_SKIPPED = 8  # positions at the beginning of each text: hardly any context
_BEST = 0.8


@dataclass(frozen=True, slots=True)
class Subject:
    """A model, calibrated: what every trial shares."""

    checkpoint: Checkpoint
    groups: Sequence[InputGroup]
    kept: frozenset[str]
    absmax: Any
    calibration: TokenRows
    held_out: TokenRows

    def plan(self, smoothing: float, clipping: float = 1.0) -> PreparedWeights:
        """The plan with this smoothing, every input scale made smaller by the factor `clipping`."""
        how = QdqQuantization("w8a8", smoothing=smoothing, keep=())
        prepared = plan_activations(self.groups, how, self.kept, self.checkpoint.tensors, self.absmax)
        inputs = {name: replace(one, scale=one.scale * clipping) for name, one in prepared.plan.inputs.items()}
        return replace(prepared, plan=replace(prepared.plan, inputs=inputs))

    def simulation(self, prepared: PreparedWeights) -> Simulation:
        """The twin of the graph of that plan, nothing rounded yet."""
        return Simulation(self.checkpoint.config, prepared.tensors, prepared.plan)


def calibrated(model: str) -> Subject:
    """Open MODEL and calibrate it on the built-in text."""
    checkpoint = open_checkpoint(model)
    graph = trace(checkpoint.config, DIALECTS["tensorrt"](), "fp16").model
    how = QdqQuantization("w8a8")
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), checkpoint.tokenizer, checkpoint.generation)
        encoder = TextEncoder(Path(folder), checkpoint.config.vocab_size)
    longest = checkpoint.config.max_position_embeddings
    rows = calibration_rows(CALIBRATION, encoder, DEFAULT_TOKENS, longest)
    held = torch.tensor(held_out_rows(encoder, min(HELD_OUT_TOKENS, longest)))
    held_out = TokenRows(held, (held.shape[1],) * len(held))
    absmax = input_absmax(checkpoint.config, checkpoint.tensors, rows)
    kept = kept_by_pattern(graph, how)
    return Subject(checkpoint, projection_groups(graph, how), kept, absmax, rows, held_out)


def smoothing(subject: Subject) -> Iterator[dict[str, Any]]:
    """Every projection quantized, and all but the costliest kind (those that read a product), per strength."""
    products = [group for group in subject.groups if _reads_a_product(group)]
    for alpha in _SMOOTHING:
        with subject.simulation(subject.plan(alpha)) as simulation:
            reference = _run(subject, simulation, ())
            for kept in ((), products):
                quantized = [group for group in subject.groups if group not in kept]
                yield {
                    "part": "smoothing",
                    "smoothing": alpha,
                    "kept": "down_proj" if kept else "none",
                    **_figures(reference, _run(subject, simulation, quantized)),
                }


def clipping(subject: Subject) -> Iterator[dict[str, Any]]:
    """Input scales below the calibrated maximum: finer steps, and what sticks out is cut off."""
    for factor in _CLIPPING:
        with subject.simulation(subject.plan(_BEST, factor)) as simulation:
            reference = _run(subject, simulation, ())
            figures = _figures(reference, _run(subject, simulation, subject.groups))
        yield {"part": "clipping", "smoothing": _BEST, "clipping": factor, **figures}


def kept(subject: Subject) -> Iterator[dict[str, Any]]:
    """The n costliest groups left in high precision, ranked on the calibration's text as the export does."""
    with subject.simulation(subject.plan(_BEST)) as simulation:
        ranked = rank_groups(simulation, subject.groups, judged_rows(subject.calibration))
        reference = _run(subject, simulation, ())
        for count in _KEPT:
            figures = _figures(reference, _run(subject, simulation, ranked[count:]))
            names = [group.tensors[0] for group in ranked[:count]]
            yield {"part": "kept", "smoothing": _BEST, "kept": names, "groups": len(ranked), **figures}


def _reads_a_product(group: InputGroup) -> bool:
    """Whether a projection folds its smoothing into another's rows: down_proj, by structure."""
    return len(group.makers) > 0 and not any("norm" in name for name in group.makers)


def _run(subject: Subject, simulation: Simulation, quantized: Sequence[InputGroup]) -> Tensor:
    simulation.activate(names_of(quantized))
    rows = simulation.log_probabilities(subject.held_out)
    return rows.view(len(subject.held_out.lengths), -1, rows.shape[-1])[:, _SKIPPED:].flatten(0, 1)


def _figures(reference: Tensor, other: Tensor) -> dict[str, float]:
    kl = (reference.exp() * (reference - other)).sum(dim=-1)
    agreement = (reference.argmax(dim=-1) == other.argmax(dim=-1)).float().mean()
    return {"mean_kl": float(kl.mean()), "max_kl": float(kl.max()), "top1_agreement": float(agreement)}


def main(arguments: list[str]) -> int:
    """MODEL FILE [PART…]: run the parts (all by default), and put their records beside what FILE holds of others."""
    if len(arguments) < 2 or not set(arguments[2:]) <= set(PARTS):
        print(
            f"usage: python -m starling.profiling.quality.w8a8_sweep MODEL FILE [{'|'.join(PARTS)}]…", file=sys.stderr
        )
        return 2
    model, file, parts = arguments[0], Path(arguments[1]), arguments[2:] or PARTS
    subject = calibrated(model)
    old = json.loads(file.read_text())["trials"] if file.exists() else []
    trials = [trial for trial in old if trial["part"] not in parts]
    for part in (smoothing, clipping, kept):
        if part.__name__ in parts:
            for trial in part(subject):
                trials.append(trial)
                print(json.dumps(trial), flush=True)
                _write(file, subject, trials)
    return 0


def _write(file: Path, subject: Subject, trials: list[dict[str, Any]]) -> None:
    record = {
        "model": subject.checkpoint.name,
        "scheme": "w8a8",
        "calibration_tokens": subject.calibration.tokens,
        "held_out_positions": (subject.held_out.ids.shape[1] - _SKIPPED) * len(subject.held_out.lengths),
        "torch": torch.__version__,
        "trials": trials,
    }
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

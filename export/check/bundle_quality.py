"""The quality of a bundle against the PyTorch model in float32, on text that no calibration has seen."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from starling.engine.bundle.manifest import Bundle
from starling.engine.bundle.model_records import Architecture
from starling.engine.errors import UserError
from starling.engine.host import available_memory
from starling.engine.verification import REFERENCE_TOKENS, compared_positions, keep_reference
from starling.export.check.gguf_source import load_gguf_source
from starling.export.check.parity import Parity, bundle_logits, compare
from starling.export.check.reward_module import load_reward_source
from starling.export.check.same_weights import require_same
from starling.export.check.sample_texts import TextEncoder, held_out_rows
from starling.export.check.source_model import load_folder_source
from starling.export.check.torch_reference import load_reference, reference_logits
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.quantization.blocks import BlockQuantization
from starling.export.quantization.qdq_scheme import MAX_MEAN_KL
from starling.export.quantization.qdq_settings import QdqQuantization

HELD_OUT_TOKENS = 128  # of each held-out text
CUT_LAYERS = 2


def measure(checkpoint: Checkpoint, folder: Path) -> tuple[Parity, dict[str, Any]]:
    """Compare the bundle in `folder` with the PyTorch model of `checkpoint`, which has as many layers.

    A few of PyTorch's logits stay in the folder; the second result is what bundle.json says of them.
    """
    bundle = Bundle.open(folder)
    texts = held_out_texts(bundle)
    rows = [text[:-1] for text in texts]
    positions = compared_positions(len(rows[0]))
    model = load_compared(checkpoint)
    reference = np.concatenate([reference_logits(model, row)[positions].numpy() for row in rows])
    del model  # the bundle is loaded next: the two need not fit at once
    next_ids = [text[p + 1] for text in texts for p in positions]
    logits, kernels = bundle_logits(bundle, rows)
    kept = rows[0][:REFERENCE_TOKENS]
    count = len(compared_positions(len(kept)))
    verification = keep_reference(folder, kept, reference[:count], logits[:count])
    return compare(reference, logits, next_ids, bundle.architecture.layers, kernels), verification


def keep_logits(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Keep PyTorch's logits as `measure` does, for a bundle that the CPU does not run."""
    text = held_out_texts(Bundle.open(folder))[0][:-1][:REFERENCE_TOKENS]
    return keep_reference(folder, text, reference_logits(model, text)[compared_positions(len(text))].numpy(), None)


def held_out_texts(bundle: Bundle) -> list[list[int]]:
    """Held-out texts of one length, each with the token that follows."""
    arch = bundle.architecture
    return held_out_rows(TextEncoder(bundle.folder, arch.vocab_size), min(HELD_OUT_TOKENS, arch.max_positions) + 1)


def load_compared(checkpoint: Checkpoint) -> nn.Module:
    """What transformers loads of the checkpoint's files, in float32, held against what was exported of them.

    A value head is loaded by PyTorch.

    Random weights have no files: their reference has the same numbers as the bundle.
    Raises StarlingError where a weight or the configuration is not what was exported.
    """
    if checkpoint.path is None:
        return load_reference(checkpoint.config, checkpoint.tensors)
    load = load_gguf_source if checkpoint.kind == "gguf" else load_folder_source
    if checkpoint.pooling is not None and checkpoint.pooling.read_at == "before_first_pad":
        load = load_reward_source
    source = load(checkpoint, checkpoint.path)
    require_same(checkpoint, source)
    return source.model


def memory_needed(arch: Architecture, layers: int) -> int:
    """A generous estimate in bytes: PyTorch's float32 weights, the runtime's copy of them, and slack."""
    ends = arch.vocab_size * arch.hidden_size * (1 if arch.tied_embeddings else 2)
    per_layer = (arch.parameters - ends) // arch.layers
    return int(4 * (ends + layers * per_layer) * 2.5)


def fits(arch: Architecture, layers: int) -> bool:
    """Whether `layers` layers of the model can be compared in the memory that is free."""
    return memory_needed(arch, layers) <= available_memory()


def require_quality(parity: Parity, how: BlockQuantization | QdqQuantization | None) -> None:
    """Raise UserError where quantized activations cost more than MAX_MEAN_KL."""
    if isinstance(how, QdqQuantization) and how.activations is not None and parity.mean_kl > MAX_MEAN_KL:
        raise UserError(
            f"{how.scheme}: mean KL {parity.mean_kl:.3f} nats against PyTorch is more than {MAX_MEAN_KL:g}; try "
            "another --smoothing, --calibration with text of your own, --keep-precision '*.down_proj.weight' or "
            "--quant int8, or take it as it is with --accept-quality"
        )

"""Blocks of quantized weights: the numbers, the layout, and what ONNX Runtime makes of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from families import Family, random_folder
from torch import Tensor

from starling.engine.backends.open_backend import open_backend
from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import UserError
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.checkpoints.model_source import open_checkpoint
from starling.export.exporter import ExportOptions, export_bundle
from starling.export.quantization.blocks import BlockQuantization, quantize_rows


def dequantize(data: Tensor, scales: Tensor, zeros: Tensor, how: BlockQuantization, columns: int) -> Tensor:
    """The formula of MatMulNBits, written out."""
    if how.bits == 4:
        data = torch.stack((data & 15, data >> 4), dim=-1).flatten(-2)
        zeros = torch.stack((zeros & 15, zeros >> 4), dim=-1).flatten(-2)[:, : scales.shape[1]]
    values = (data.float() - zeros.float()[..., None]) * scales[..., None]
    return values.flatten(1)[:, :columns]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("columns", [64, 80, 96])  # 80: a short last block; 96: an odd number of blocks
def test_every_weight_in_8_bits_is_within_half_a_step(symmetric: bool, columns: int) -> None:
    how = BlockQuantization("int8", block_size=32, symmetric=symmetric)
    rows = some_rows(columns)
    data, scales, zeros = quantize_rows(rows, how)
    error = (dequantize(data, scales, zeros, how, columns) - rows).abs()
    step = scales.repeat_interleave(how.block_size, dim=1)[:, :columns]
    # a zero point is rounded too, so an end of an asymmetric block may lie one step off
    assert (error <= step * (0.5 if symmetric else 1.0) + 1e-6).all()
    assert (error[3] == 0).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("columns", [64, 80, 96])
def test_4_bits_are_nearer_than_over_the_whole_range(symmetric: bool, columns: int) -> None:
    how = BlockQuantization("int4", block_size=32, symmetric=symmetric)
    rows = some_rows(columns)
    error = dequantize(*quantize_rows(rows, how), how, columns) - rows
    blocks = torch.nn.functional.pad(rows, (0, -columns % 32)).view(100, -1, 32)
    low, high = blocks.amin(dim=2, keepdim=True).clamp(max=0), blocks.amax(dim=2, keepdim=True).clamp(min=0)
    step = (torch.maximum(-low, high) / 7 if symmetric else (high - low) / 15).clamp(min=1e-9)
    whole_range = (blocks / step).round() * step - blocks
    assert error.square().sum() < 0.95 * whole_range.square().sum()
    assert (error[3] == 0).all()


def some_rows(columns: int) -> Tensor:
    rows = torch.randn(100, columns, generator=torch.Generator().manual_seed(0))
    rows[3] = 0  # a row of zeros has no scale of its own
    rows[4] = rows[4].abs() + 1  # a row without a sign change still holds zero exactly
    return rows


@pytest.mark.parametrize(("scheme", "mean_kl"), [("int8", 0.001), ("int4", 0.05)])
def test_the_bundle_says_how_far_it_is_from_pytorch(
    scheme: str, mean_kl: float, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    options = ExportOptions(quantization=BlockQuantization(scheme), check=True)
    export_bundle(tiny_checkpoint, tmp_path / "bundle", options)
    parity = json.loads((tmp_path / "bundle" / "bundle.json").read_text())["parity"]
    assert 0 < parity["mean_kl"] < mean_kl
    assert parity["positions"] > 50


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_width_that_no_block_divides(scheme: str, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """hidden 80 in blocks of 32 ends in half a block, in the tied embedding as in every projection."""
    family = Family("narrow", "llama", {"hidden_size": 80, "tie_word_embeddings": True})
    folder = random_folder(family, tiny_checkpoint, tmp_path / "model")
    options = ExportOptions(quantization=BlockQuantization(scheme, block_size=32), check=True)
    export_bundle(open_checkpoint(str(folder)), tmp_path / "bundle", options)
    parity = json.loads((tmp_path / "bundle" / "bundle.json").read_text())["parity"]
    assert parity["mean_kl"] < (
        0.01 if scheme == "int8" else 0.6
    )  # noise of this size; a misread row gives several nats


def test_tied_weights_are_stored_once(demo_int8_bundle: Path) -> None:
    """Embedding and lm_head of SmolLM2 share 49152 x 576 weights: one byte each, scales and zero points beside."""
    manifest = json.loads((demo_int8_bundle / "bundle.json").read_text())
    parameters = manifest["architecture"]["parameters"]
    bytes_per_weight = 1 + (4 + 1) / 32  # data, float32 scale and zero point per block of 32
    tables = 2 * manifest["architecture"]["max_positions"] * 32 * 4
    assert manifest["weights"]["bytes"] < parameters * bytes_per_weight + tables + 2**20
    assert (demo_int8_bundle / "model.onnx.data").stat().st_size < 1.02 * manifest["weights"]["bytes"]


def test_int8_of_the_real_model_is_close(demo_int8_bundle: Path) -> None:
    parity = json.loads((demo_int8_bundle / "bundle.json").read_text())["parity"]
    assert parity["mean_kl"] < 0.005
    assert parity["perplexity"] < 1.02 * parity["reference_perplexity"]


def test_fp16_activations_with_quantized_weights(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    options = ExportOptions(dtype="fp16", quantization=BlockQuantization("int8"), check=False)
    export_bundle(tiny_checkpoint, tmp_path / "bundle", options)
    backend = open_backend(Bundle.open(tmp_path / "bundle"), name="onnxruntime-cpu", max_seq=32)
    logits = backend.prefill(0, np.array([1, 420, 6316]), 0).logits()[0]
    assert np.isfinite(logits).all()
    assert logits.std() > 0
    backend.close()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"scheme": "int3"}, "int3"),
        ({"scheme": "int8", "block_size": 48}, "48"),
        ({"scheme": "int4", "accuracy_level": 9}, "9"),
    ],
)
def test_unknown_settings_are_named(settings: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        BlockQuantization(**settings)  # type: ignore[arg-type]


def test_the_oracle_stays_in_full_precision() -> None:
    with pytest.raises(UserError, match="--dialect ort"):
        ExportOptions(dialect="canonical", quantization=BlockQuantization("int8"))

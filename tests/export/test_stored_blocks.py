"""Weights that a checkpoint has quantized itself are in the bundle bit for bit, where its blocks can hold them."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from block_weights import block_weights, names_in
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, dequantize
from gguf_models import VOCABULARY, write_gguf
from torch import Tensor
from transformers import LlamaConfig

from starling.export.check.gguf_source import load_gguf_source
from starling.export.checkpoints.gguf_file import INTEGER_BITS, read_gguf
from starling.export.checkpoints.model_source import open_checkpoint
from starling.export.exporter import ExportOptions, export_bundle
from starling.export.quantization.blocks import BlockQuantization

LLAMA = LlamaConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCABULARY,
    max_position_embeddings=256,
    tie_word_embeddings=False,
    rms_norm_eps=1e-5,
)
PROJECTIONS = 7 * LLAMA.num_hidden_layers


def require_equal(bundle: Path, expected: Mapping[str, Tensor]) -> None:
    """Hold every weight of a bundle in blocks against those of a PyTorch model, to the bit."""
    found = block_weights(bundle)
    assert found
    for name, values in found.items():
        wanted = np.concatenate([expected[each].numpy() for each in names_in(name)])
        assert np.array_equal(values, wanted), name


def by_the_package(path: Path) -> dict[str, Tensor]:
    """The weights of a GGUF file, dequantized by the package gguf and put in place by transformers."""
    checkpoint = open_checkpoint(str(path))
    return dict(load_gguf_source(checkpoint, path).model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        (GGMLQuantizationType.Q8_0, "int8"),
        (GGMLQuantizationType.Q4_0, "int4"),
        (GGMLQuantizationType.Q4_0, "int8"),
        (GGMLQuantizationType.Q5_0, "int8"),
    ],
    ids=lambda value: str(getattr(value, "name", value)),
)
def test_blocks_of_a_gguf_file_are_taken_bit_for_bit(tmp_path: Path, kind: GGMLQuantizationType, scheme: str) -> None:
    file = tmp_path / "m.gguf"
    write_gguf(file, LLAMA, kind=kind)
    options = ExportOptions(quantization=BlockQuantization(scheme, accuracy_level=0))
    manifest = export_bundle(open_checkpoint(str(file)), tmp_path / "b", options)
    require_equal(tmp_path / "b", by_the_package(file))
    how = manifest["quantization"]
    assert (len(how["as_stored"]), how["calibration"]) == (PROJECTIONS + 2, None)
    assert manifest["parity"]["max_abs_logit_diff"] < 1e-3  # the model is the file's, not one near it
    assert f"taken bit for bit, as they are stored: {PROJECTIONS + 2} weights of {kind.name}" in manifest["notes"]


@pytest.mark.slow
def test_what_blocks_cannot_hold_is_quantized_again_and_said(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    write_gguf(file, LLAMA, kind=GGMLQuantizationType.Q4_1)  # zero points between whole numbers
    options = ExportOptions(quantization=BlockQuantization("int8"), check=False)
    export_bundle(open_checkpoint(str(file)), tmp_path / "b", options)
    manifest = json.loads((tmp_path / "b" / "bundle.json").read_text(encoding="utf-8"))
    assert manifest["quantization"]["as_stored"] == []
    said = f"dequantized, and quantized again in blocks of 32: {PROJECTIONS + 2} weights of Q4_1"
    assert said in manifest["notes"]


def one_tensor(path: Path, kind: GGMLQuantizationType, rows: int, columns: int) -> Tensor:
    """A GGUF file with one tensor `t` of random blocks; its values by the package gguf."""
    size, block_bytes = GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (rows, columns // size, block_bytes), dtype=np.uint8)
    scales = generator.standard_normal((rows, columns // size, 1)).astype(np.float16)
    scales[0, 0] = 0
    blocks[:, :, :2] = scales.view(np.uint8)
    data = blocks.reshape(rows, -1)
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("t", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return torch.from_numpy(dequantize(data, kind))


@pytest.mark.parametrize("kind", INTEGER_BITS, ids=lambda kind: str(kind.name))
def test_any_bytes_of_such_blocks_are_whole_numbers_times_their_scale(
    tmp_path: Path, kind: GGMLQuantizationType
) -> None:
    expected = one_tensor(tmp_path / "t.gguf", kind, 40, 128)
    index = np.array([3, 0, 17, 39])
    whole, scales = read_gguf(tmp_path / "t.gguf").integers("t", index)
    values = whole.float() * scales.repeat_interleave(32, dim=1)
    assert torch.equal(values, expected[index])
    bits = INTEGER_BITS[kind]
    assert -(2 ** (bits - 1)) <= whole.min() <= whole.max() < 2 ** (bits - 1)

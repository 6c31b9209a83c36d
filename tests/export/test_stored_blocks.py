"""Weights that a checkpoint has quantized itself are in the bundle bit for bit, where its blocks can hold them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from block_weights import block_weights, names_in
from command_line import document
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, dequantize
from gguf_models import VOCABULARY, write_gguf
from packed_checkpoints import Pack, awq, gptq, int_quantized, pack_quantized, random_whole, write_packed
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig

from starling.export.check.gguf_source import load_gguf_source
from starling.export.checkpoints.gguf_file import INTEGER_BITS, read_gguf
from starling.export.checkpoints.model_source import open_checkpoint
from starling.export.exporter import ExportOptions, export_bundle
from starling.export.quantization.blocks import BlockQuantization
from starling.export.quantization.calibration_choice import NONE, Calibration

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


GROUP = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 64}
CHANNEL = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
DYNAMIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def compressed(layout: str, weights: dict[str, Any], **others: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights} | others
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}


#: quantization_config, bits, group, the zero point is the middle, type of the scales, layout
FOLDERS: dict[str, tuple[dict[str, Any], int, int, bool, torch.dtype, Pack]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 64}, 4, 64, True, torch.float16, gptq(1)),
    "gptq 8 bits": (
        {"quant_method": "gptq", "bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2"},
        *(8, -1, True, torch.float16, gptq(0)),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32}, 4, 32, False, torch.float16, awq),
    "pack-quantized": (compressed("pack-quantized", GROUP), 4, 64, False, torch.bfloat16, pack_quantized),
    "int-quantized": (
        compressed("int-quantized", CHANNEL, input_activations=DYNAMIC),
        *(8, -1, True, torch.bfloat16, int_quantized),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDERS)
def test_whole_numbers_of_a_folder_are_taken_bit_for_bit(tmp_path: Path, name: str) -> None:
    settings, bits, group, symmetric, dtype, pack = FOLDERS[name]

    def make(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        shape = (weight.shape[0], weight.shape[1])
        whole = random_whole(shape, bits, group, symmetric=symmetric, dtype=dtype)
        return pack(whole), whole.values

    expected = write_packed(tmp_path / "m", settings, make)
    checkpoint = open_checkpoint(str(tmp_path / "m"))
    assert checkpoint.scheme == f"int{bits}"
    options = ExportOptions(quantization=BlockQuantization(f"int{bits}", accuracy_level=0))
    manifest = export_bundle(checkpoint, tmp_path / "b", options)
    require_equal(tmp_path / "b", expected)
    assert manifest["quantization"]["as_stored"] == sorted(name for name in expected if "_proj" in name)
    assert manifest["quantization"]["calibration"] is None
    assert manifest["parity"]["max_abs_logit_diff"] < 1e-3
    assert any("bit for bit" in note and "14 weights" in note for note in manifest["notes"])


def in_an_order_of_its_own(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    shape = (weight.shape[0], weight.shape[1])
    whole = random_whole(shape, 4, 32, symmetric=False, dtype=torch.float16, in_order=False)
    return gptq(1)(whole), whole.values


def scales_beyond_float16(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    shape = (weight.shape[0], weight.shape[1])
    whole = random_whole(shape, 8, -1, symmetric=True, dtype=torch.float32)
    return int_quantized(whole), whole.values


def floats_in_blocks(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    codes = (torch.randn(weight.shape) * 100).to(torch.float8_e4m3fn)
    rows, columns = (torch.arange(size) // 64 for size in weight.shape)
    scales = torch.rand(int(rows[-1]) + 1, int(columns[-1]) + 1) / 2000
    return {"weight": codes, "weight_scale_inv": scales}, codes.float() * scales[rows][:, columns]


AGAIN = {
    "gptq with desc_act": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True},
        *(in_an_order_of_its_own, "int4", "14 weights of gptq int4 in an order of its own"),
    ),
    "scales of float32": (
        compressed("int-quantized", CHANNEL),
        *(scales_beyond_float16, "int8", "14 weights of compressed-tensors int8"),
    ),
    "fp8": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [64, 64]},
        *(floats_in_blocks, "int8", "14 weights of fp8"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", AGAIN)
def test_a_folder_that_blocks_cannot_hold_is_near_its_own_values(tmp_path: Path, name: str) -> None:
    settings, make, scheme, said = AGAIN[name]
    expected = write_packed(tmp_path / "m", settings, make)
    checkpoint = open_checkpoint(str(tmp_path / "m"))
    for weight in expected:
        assert torch.equal(checkpoint.tensors.rows(weight, 0, len(expected[weight])).float(), expected[weight])
    assert checkpoint.scheme == scheme
    options = ExportOptions(quantization=BlockQuantization(scheme), calibration=Calibration(NONE))
    manifest = export_bundle(checkpoint, tmp_path / "b", options)
    assert manifest["quantization"]["as_stored"] == []
    assert f"dequantized, and quantized again in blocks of 32: {said}" in manifest["notes"]
    assert manifest["parity"]["mean_kl"] < (0.5 if scheme == "int4" else 0.01)  # uniform numbers round badly


def test_floats_in_blocks_have_the_values_that_transformers_gives_them(tmp_path: Path) -> None:
    write_packed(tmp_path / "m", AGAIN["fp8"][0], floats_in_blocks)
    tensors = open_checkpoint(str(tmp_path / "m")).tensors
    how = FineGrainedFP8Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", quantization_config=how, dtype=torch.float32)
    for name, values in model.state_dict().items():
        assert torch.equal(tensors.rows(name, 0, len(values)).float(), values), name


@pytest.mark.slow
def test_full_precision_of_a_quantized_folder_is_its_own_values(tmp_path: Path) -> None:
    write_packed(tmp_path / "m", AGAIN["fp8"][0], floats_in_blocks)
    manifest = document("export", tmp_path / "m", tmp_path / "b", "--quant", "none", "--json")
    assert (manifest["quantization"], manifest["dtype"]) == (None, "fp32")
    assert manifest["parity"]["max_abs_logit_diff"] < 1e-3
    default = document("export", tmp_path / "m", tmp_path / "int8", "--no-check", "--json")
    assert default["quantization"]["scheme"] == "int8"

"""Quantized weights of Hugging Face checkpoints have the values that the methods' own packages give them."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from starling.engine.errors import CheckpointError, StarlingError, UnsupportedModelError
from starling.export.check.packed_source import dequantized_weights
from starling.export.checkpoints.packed.packed_tensors import PackedTensors
from starling.export.checkpoints.packed.packed_weight import IntegerWeight
from starling.export.checkpoints.packed.packing_settings import PackingSettings, read_packing
from starling.export.checkpoints.stored_tensors import open_safetensors

#: Random numbers, and what the packages' own functions make of them; its metadata names versions and functions.
BY_THE_PACKAGES = Path(__file__).parents[1] / "data" / "packed_weights.safetensors"
GROUPS = {"type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


def gptq(bits: int, layout: str = "gptq") -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": 32, "checkpoint_format": layout}


def compressed(layout: str, bits: int, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": GROUPS | {"num_bits": bits} | weights}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}


SETTINGS = {
    "gptq.int4": gptq(4),
    "gptq.int8": gptq(8),
    "gptq_v2.int4": gptq(4, "gptq_v2"),  # with the inputs in an order of their own, as desc_act makes it
    "gptq_v2.int8": gptq(8, "gptq_v2"),
    "awq.int4": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    "compressed-tensors.pack4": compressed("pack-quantized", 4),
    "compressed-tensors.pack4asym": compressed("pack-quantized", 4, symmetric=False),
    "compressed-tensors.pack8": compressed("pack-quantized", 8),
    "compressed-tensors.pack8asym": compressed("pack-quantized", 8, symmetric=False),
    "compressed-tensors.channel8": compressed("int-quantized", 8, strategy="channel"),
    "compressed-tensors.naive8": compressed("naive-quantized", 8, strategy="tensor"),
    "compressed-tensors.fp8": compressed("float-quantized", 8, type="float", strategy="channel"),
    "fp8.block": {"quant_method": "fp8", "weight_block_size": [16, 16]},
}


def stored(case: str) -> dict[str, Tensor]:
    """The tensors of a case, as the method stores them, and what they are `expected` to stand for."""
    with safe_open(BY_THE_PACKAGES, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(f"{case}.")]  # noqa: SIM118
        return {name.removeprefix(f"{case}."): file.get_tensor(name) for name in names}


def write(folder: Path, parts: dict[str, Tensor]) -> Path:
    save_file({f"m.{name}": tensor for name, tensor in parts.items()}, folder / "model.safetensors")
    return folder


def settings_of(case: str, **changes: Any) -> PackingSettings:
    found = read_packing({"quantization_config": SETTINGS[case] | changes}, "folder")
    assert found is not None
    return found


def opened(folder: Path, settings: PackingSettings) -> PackedTensors:
    return PackedTensors(open_safetensors(folder), settings)


@pytest.mark.parametrize("case", SETTINGS)
def test_values_are_those_of_the_methods_own_package(tmp_path: Path, case: str) -> None:
    parts = stored(case)
    expected = parts.pop("expected")
    tensors = opened(write(tmp_path, parts), settings_of(case))
    assert list(tensors.names()) == ["m.weight"]
    assert tensors.shape("m.weight") == tuple(expected.shape)
    assert torch.equal(tensors.rows("m.weight", 0, len(expected)), expected)
    assert torch.equal(tensors.rows("m.weight", 3, 12), expected[3:12])  # from within a word of eight rows
    second = dequantized_weights(tmp_path, SETTINGS[case], lambda name: True)
    assert torch.equal(second["m.weight"], expected)


@pytest.mark.parametrize("case", [case for case in SETTINGS if "fp8" not in case])
def test_a_grid_gives_the_same_values_by_whole_numbers(tmp_path: Path, case: str) -> None:
    parts = stored(case)
    expected = parts.pop("expected")
    weight = opened(write(tmp_path, parts), settings_of(case)).weights["m.weight"]
    grid = weight.grid()
    if case.startswith("gptq_v2"):  # blocks have neighbours alone
        assert grid is None
        return
    assert grid is not None
    codes, scales, zeros = weight.stored(5, 11)
    assert 0 <= int(codes.min()) <= int(codes.max()) < 2**grid.bits
    scales, zeros = (each.repeat_interleave(grid.group, 1) for each in (scales, zeros))
    assert torch.equal((codes - zeros).float() * scales, expected[5:11])
    half = torch.equal(scales.half().float(), scales)
    assert (torch.float16 in grid.exact_in) == half


BROKEN: dict[str, tuple[str, Any, str]] = {
    "no scales": ("gptq.int4", {"scales": None}, r"no tensor m\.scales, without which m cannot be dequantized"),
    "no zero points": ("awq.int4", {"qzeros": None}, r"no tensor m\.qzeros"),
    "no zero points of an asymmetric one": (
        "compressed-tensors.pack4asym",
        {"weight_zero_point": None},
        r"no tensor m\.weight_zero_point",
    ),
    "no scale of floats": ("fp8.block", {"weight_scale_inv": None}, r"no tensor m\.weight_scale"),
    "scales of another height": ("gptq.int4", {"scales": torch.ones(3, 16).half()}, r"m\.scales is \[3, 16\].* no fit"),
    "whole numbers for scales": ("awq.int4", {"scales": torch.ones(2, 16).int()}, r"m\.scales is I32, not F32 or"),
    "no groups": (
        "gptq.int4",
        {"scales": torch.ones(0, 16).half(), "qzeros": torch.ones(0, 2).int()},
        r"m\.qzeros is \[0, 2\], which is no matrix",
    ),
    "a flat matrix": ("gptq.int4", {"qweight": torch.ones(128).int()}, r"m\.qweight is \[128\], which is no matrix"),
    "too few groups": (
        "gptq.int4",
        {"scales": torch.ones(1, 16).half(), "qzeros": torch.ones(1, 2).int()},
        r"m has 1 scales a row for 64 inputs in groups of 32: no fit",
    ),
    "groups beyond the last": (
        "gptq.int4",
        {"g_idx": torch.full((64,), 2**30).int()},
        r"m\.g_idx names group 10737418",
    ),
    "groups below the first": (
        "gptq.int4",
        {"g_idx": torch.arange(-1, 63).int()},
        r"m\.g_idx names group -1 of 2",
    ),
    "groups of other inputs": ("gptq.int4", {"g_idx": torch.zeros(63).int()}, r"m\.g_idx is \[63\].*\[64\]: no fit"),
    "another shape": (
        "compressed-tensors.pack4",
        {"weight_shape": torch.tensor([2**40, 64])},
        r"m\.weight_shape is \[1099511627776, 64\], its weight_packed has 16 rows",
    ),
    "inputs without end": (
        "compressed-tensors.pack4",
        {"weight_shape": torch.tensor([16, 2**60])},
        r"m has 0 bits a weight",
    ),
    "numbers of another width": (
        "compressed-tensors.pack4",
        {"weight_packed": torch.ones(16, 16).int()},
        r"m has 8 bits a weight, not 4: no fit",
    ),
    "a weight that is quantized and is not": (
        "gptq.int4",
        {"weight": torch.ones(16, 64)},
        r"has both m\.qweight, which is quantized, and m\.weight, which is not",
    ),
    "scales of no block": ("fp8.block", {"weight_scale_inv": torch.ones(2, 2)}, r"m\.weight_scale_inv is \[2, 2\]"),
    "scales of other rows": (
        "compressed-tensors.channel8",
        {"weight_scale": torch.ones(15, 1)},
        r"m\.weight_scale is \[15, 1\], which is not for 16 rows",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_tensors_that_do_not_fit_together_are_one_line(tmp_path: Path, name: str) -> None:
    case, changes, line = BROKEN[name]
    parts = {part: t for part, t in (stored(case) | changes).items() if t is not None and part != "expected"}
    with pytest.raises((CheckpointError, UnsupportedModelError), match=line) as caught:
        opened(write(tmp_path, parts), settings_of(case))
    assert "\n" not in str(caught.value)
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("case", "part", "order"),
    [
        ("gptq_v2.int4", "g_idx", {"desc_act": True}),
        ("compressed-tensors.pack4", "weight_g_idx", {"actorder": "group"}),
    ],
)
def test_inputs_in_an_order_of_their_own_say_which(tmp_path: Path, case: str, part: str, order: dict[str, Any]) -> None:
    parts = {name: tensor for name, tensor in stored(case).items() if name not in ("expected", part)}
    settings = compressed("pack-quantized", 4, **order) if "actorder" in order else SETTINGS[case] | order
    found = read_packing({"quantization_config": settings}, "folder")
    assert found is not None
    with pytest.raises(CheckpointError, match=rf"no tensor m\.{part}, without which"):
        opened(write(tmp_path, parts), found)


def test_a_group_ends_with_the_row_however_long_it_is_said_to_be(tmp_path: Path) -> None:
    parts = {"qweight": torch.ones(8, 16), "qzeros": torch.zeros(1, 2), "scales": torch.ones(1, 16)}
    folder = write(tmp_path, {name: tensor if name == "scales" else tensor.int() for name, tensor in parts.items()})
    weight = opened(folder, settings_of("gptq.int4", group_size=2**31 - 32)).weights["m.weight"]
    assert isinstance(weight, IntegerWeight)
    assert weight.group == 64


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("case", "part"), [("gptq.int4", "scales"), ("awq.int4", "scales"), ("fp8.block", "weight_scale_inv")]
)
def test_scales_that_are_no_numbers_are_refused(tmp_path: Path, case: str, part: str, number: float) -> None:
    parts = {name: tensor for name, tensor in stored(case).items() if name != "expected"}
    parts[part][-1, -1] = number
    tensors = opened(write(tmp_path, parts), settings_of(case))
    height = tensors.shape("m.weight")[0]
    assert bool(tensors.rows("m.weight", 0, 1).isfinite().all())
    with pytest.raises(CheckpointError, match=r"tensor m\.weight has numbers that are not finite"):
        tensors.rows("m.weight", height - 1, height)


@pytest.mark.parametrize("part", ["g_idx", "qzeros"])
def test_a_part_that_only_the_index_knows_is_refused(tmp_path: Path, part: str) -> None:
    parts = {name: tensor for name, tensor in stored("gptq.int4").items() if name not in ("expected", part)}
    write(tmp_path, parts)
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    names = {f"m.{name}": "a.safetensors" for name in (*parts, part)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match=rf"a\.safetensors has no tensor m\.{part}, which .*index\.json puts"):
        opened(tmp_path, settings_of("gptq.int4"))


REFUSED: list[tuple[dict[str, Any], type[StarlingError], str]] = [
    ({"quant_method": "bitsandbytes"}, UnsupportedModelError, "quantized by 'bitsandbytes'; gptq, awq, compressed-"),
    ({}, UnsupportedModelError, "quantized by None"),
    ({"quant_method": ["gptq"]}, UnsupportedModelError, r"quantized by \['gptq'\]"),
    *((gptq(bits), UnsupportedModelError, f"with bits {bits}; read is 4, 8") for bits in (2, 3, 5, 6)),
    *(({**gptq(4), "bits": bits}, UnsupportedModelError, f"with bits {bits}; read") for bits in (4.0, True)),
    (gptq(4) | {"checkpoint_format": False}, UnsupportedModelError, "with checkpoint_format False; read is gptq"),
    (gptq(4, "marlin"), UnsupportedModelError, "with checkpoint_format 'marlin'; read is gptq, gptq_v2"),
    (gptq(4) | {"pack_dtype": "int16"}, UnsupportedModelError, "with pack_dtype 'int16'"),
    (SETTINGS["awq.int4"] | {"version": "gemv"}, UnsupportedModelError, "with version 'gemv'; read is gemm"),
    (SETTINGS["awq.int4"] | {"bits": 8}, UnsupportedModelError, "with bits 8; read is 4"),
    (compressed("nvfp4-pack-quantized", 4), UnsupportedModelError, "with format 'nvfp4-pack-quantized'; read is pack-"),
    (compressed("pack-quantized", 3), UnsupportedModelError, "with num_bits 3; read is 4, 8"),
    (compressed("float-quantized", 4, type="float"), UnsupportedModelError, "num_bits of type float 4; read is 8"),
    (
        compressed("pack-quantized", 4) | {"transform_config": {"config_groups": {"u": {}}}},
        UnsupportedModelError,
        "with a transform_config cannot be read",
    ),
    (
        compressed("pack-quantized", 4) | {"sparsity_config": {"format": "sparse-24-bitmask"}},
        UnsupportedModelError,
        "with a sparsity_config cannot be read",
    ),
    ({"quant_method": "fp8", "fmt": "e5m2"}, UnsupportedModelError, "with fmt 'e5m2'; read is e4m3"),
    (gptq(4) | {"group_size": 0}, CheckpointError, "group_size of its quantization_config is 0, no number of inputs"),
    (gptq(4) | {"group_size": "32"}, CheckpointError, "group_size of its quantization_config is '32'"),
    ({"quant_method": "fp8", "weight_block_size": [0, 1]}, CheckpointError, r"is \[0, 1\], no two sizes"),
    ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, CheckpointError, "config_groups"),
]


@pytest.mark.parametrize(("settings", "kind", "line"), REFUSED)
def test_what_cannot_be_read_is_refused_by_name(settings: dict[str, Any], kind: type[StarlingError], line: str) -> None:
    with pytest.raises(kind, match=line) as caught:
        read_packing({"quantization_config": settings | {"x": 1}}, "folder")
    assert re.match("folder", str(caught.value))


def test_scales_of_activations_and_of_the_cache_are_left_out_with_a_word(tmp_path: Path) -> None:
    parts = stored("fp8.block")
    parts.pop("expected")
    others = {"input_scale": torch.ones(1), "k_scale": torch.ones(1), "bias": torch.ones(32)}
    tensors = opened(write(tmp_path, parts | others), settings_of("fp8.block", activation_scheme="static"))
    assert set(tensors.names()) == {"m.weight", "m.bias"}
    assert set(tensors.left_out) == {"m.input_scale", "m.k_scale"}
    assert [note.partition(":")[0] for note in tensors.notes] == [
        "its quantization of activations, with scales for them, was left aside",
        "left out",
    ]


def test_a_folder_that_is_not_quantized_after_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="no weights that are quantized by gptq, config"):
        opened(write(tmp_path, {"weight": torch.ones(4, 4)}), settings_of("gptq.int4"))

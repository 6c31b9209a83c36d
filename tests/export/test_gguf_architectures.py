"""Each GGUF architecture gives transformers' model again: its weights, its settings and, with both, its logits."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf_models import ARCHITECTURES as NAME_OF
from gguf_models import VOCABULARY, rope_factors, rows_of, write_gguf
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, Gemma2TensorProcessor, LlamaTensorProcessor

from starling.engine.errors import CheckpointError, UnsupportedModelError
from starling.export.check.bundle_quality import load_compared
from starling.export.checkpoints.gguf_architectures import ARCHITECTURES
from starling.export.checkpoints.gguf_file import PLAIN_TYPES, read_gguf
from starling.export.checkpoints.gguf_rope import llama3_parameters
from starling.export.checkpoints.model_source import open_checkpoint

TOKENS, WINDOW = 40, 9
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA_31 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
OTHER_LLAMA_3 = LLAMA_31 | {"rope_theta": 10000.0, "factor": 4.0, "high_freq_factor": 8.0}
OTHER_LLAMA_3 |= {"original_max_position_embeddings": 32}
GEMMA_3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
}
HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
TIED = {"tie_word_embeddings": True}
GRANITE = {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 4.0}


def config(model_type: str, **options: Any) -> PreTrainedConfig:
    made: PreTrainedConfig = AutoConfig.for_model(model_type, **(SHAPE | options))
    return made


FAMILIES = {
    "llama": config("llama", rms_norm_eps=1e-5),
    "llama-tied": config("llama", head_dim=32, **TIED),
    "llama-biases": config("llama", attention_bias=True, mlp_bias=True),
    "llama-3.1": config("llama", head_dim=64, rope_parameters=LLAMA_31),
    "llama-3-like": config("llama", head_dim=64, rope_parameters=OTHER_LLAMA_3),
    "llama-linear": config("llama", rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
    "mistral": config("mistral", sliding_window=WINDOW),
    "qwen2": config("qwen2"),
    "qwen3": config("qwen3", head_dim=32),
    "phi3": config("phi3", sliding_window=WINDOW),
    "phi3-half": config("phi3", sliding_window=None, rope_parameters=HALF),
    "gemma": config("gemma", head_dim=32, **TIED),
    "gemma2": config("gemma2", head_dim=32, query_pre_attn_scalar=32, sliding_window=WINDOW, **TIED),
    "gemma3": config(
        "gemma3_text",
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters=GEMMA_3_ROPE,
        **TIED,
    ),
    "granite": config("granite", **GRANITE),
    "olmo2": config("olmo2"),
    "starcoder2": config("starcoder2", rope_parameters={"rope_type": "default", "rope_theta": 999999.0}, **TIED),
    "starcoder2-no-bias": config("starcoder2", use_bias=False, sliding_window=WINDOW),
    "stablelm": config("stablelm", use_qkv_bias=True, rope_parameters=HALF),
    "stablelm-parallel": config("stablelm", use_parallel_residual=True, rope_parameters=HALF),
    "phi2": config("phi", num_key_value_heads=4, rope_parameters=HALF),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_logits_of_each_family_come_back(tmp_path: Path, family: str) -> None:
    model = write_gguf(tmp_path / "m.gguf", FAMILIES[family])
    checkpoint = open_checkpoint(str(tmp_path / "m.gguf"))
    expected = model.state_dict()
    assert set(checkpoint.tensors.names()) == {n for n in expected if n != "lm_head.weight" or family not in _tied()}
    for name in checkpoint.tensors.names():
        torch.testing.assert_close(rows_of(checkpoint, name), expected[name], atol=1e-7, rtol=0)

    again = AutoModelForCausalLM.from_config(checkpoint.config, attn_implementation="eager").eval()  # type: ignore[no-untyped-call]
    again.load_state_dict({name: rows_of(checkpoint, name) for name in checkpoint.tensors.names()}, strict=False)
    again.tie_weights()
    ids = torch.randint(3, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted, found = model(ids).logits, again(ids).logits
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, atol=1e-4 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_packages_own_reading_of_each_family_is_the_same(tmp_path: Path, family: str) -> None:
    model = write_gguf(tmp_path / "m.gguf", FAMILIES[family])
    ids = torch.randint(3, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found = load_compared(open_checkpoint(str(tmp_path / "m.gguf")))(ids).logits
        torch.testing.assert_close(found, model(ids).logits)


def _tied() -> set[str]:
    return {name for name, config in FAMILIES.items() if config.tie_word_embeddings}


def test_every_architecture_of_the_table_is_among_the_families() -> None:
    assert {NAME_OF.get(config.model_type, config.model_type) for config in FAMILIES.values()} == set(ARCHITECTURES)


def test_what_the_converter_did_is_what_transformers_undoes() -> None:
    # transformers has a processor where it knows of a change; Gemma, Granite and others are missing there.
    known = {LlamaTensorProcessor: (True, False), Gemma2TensorProcessor: (False, True)}
    for name, how in ARCHITECTURES.items():
        if name in TENSOR_PROCESSORS:
            assert known[TENSOR_PROCESSORS[name]] == (how.interleaved, how.norm_plus_one), name


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # random blocks have scales that are no numbers
@pytest.mark.parametrize(
    "kind", [k for k in GGMLQuantizationType if k not in PLAIN_TYPES and k.name[0] in "QIMN"], ids=lambda k: k.name
)
def test_blocks_of_every_quantization_are_those_of_the_gguf_package(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    values, size = GGML_QUANT_SIZES[kind]
    rows, columns = 300, 2 * values
    raw = np.random.default_rng(0).integers(0, 256, (rows, columns // values * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("t", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    try:
        expected = gguf.dequantize(gguf.GGUFReader(tmp_path / "m.gguf").tensors[0].data, kind)
    except NotImplementedError:
        with pytest.raises(UnsupportedModelError, match=rf"{kind.name} tensors, which cannot be dequantized"):
            read_gguf(tmp_path / "m.gguf")
        return
    found = read_gguf(tmp_path / "m.gguf").rows("t", np.arange(7, 290))
    np.testing.assert_array_equal(found.numpy(), expected[7:290])


def test_scaling_factors_that_no_llama_3_has_are_refused(tmp_path: Path) -> None:
    factors = np.ones(8, dtype=np.float32) + np.arange(8, dtype=np.float32)
    write_gguf(tmp_path / "m.gguf", FAMILIES["llama"], tensors={"rope_freqs.weight": factors})
    with pytest.raises(UnsupportedModelError, match=r"rope_freqs\.weight that no Llama 3 scaling gives"):
        open_checkpoint(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_numbers_of_llama_3_are_found_exactly(factor: float, head_dim: int) -> None:
    rope = LLAMA_31 | {"factor": factor}
    assert llama3_parameters(rope_factors(rope, head_dim).astype(float), 500000.0) == rope


@pytest.mark.parametrize(
    ("strings", "line"),
    [
        ({"llama.rope.scaling.type": "yarn"}, "uses rope scaling 'yarn'"),
        ({"llama.attention.temperature": "x"}, r"has llama\.attention\.temperature = x, which is not known here"),
        ({"general.type": "adapter"}, "is a GGUF file of type 'adapter', not of a model"),
    ],
    ids=str,
)
def test_metadata_without_a_place_is_refused_by_name(tmp_path: Path, strings: dict[str, str], line: str) -> None:
    write_gguf(tmp_path / "m.gguf", FAMILIES["llama"], strings=strings)
    with pytest.raises(UnsupportedModelError, match=line):
        open_checkpoint(str(tmp_path / "m.gguf"))


def test_metadata_of_something_else_is_noted_by_name(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", FAMILIES["llama"], strings={"clip.projector_type": "mlp", "general.author": "x"})
    notes = open_checkpoint(str(tmp_path / "m.gguf")).notes
    assert notes == ("the file's clip.projector_type has no place in a bundle and was left out",)


def test_a_tensor_without_a_place_is_refused_by_name(tmp_path: Path) -> None:
    write_gguf(
        tmp_path / "m.gguf", FAMILIES["qwen2"], tensors={"blk.0.attn_q.weight.lora_a": np.ones(3, dtype=np.float32)}
    )
    with pytest.raises(UnsupportedModelError, match=r"tensor blk\.0\.attn_q\.weight\.lora_a, for which a qwen2 model"):
        open_checkpoint(str(tmp_path / "m.gguf"))


def test_heads_that_differ_between_layers_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", FAMILIES["llama"])
    file = read_gguf(tmp_path / "m.gguf")
    file.metadata["llama.attention.head_count_kv"] = [2, 1, 2]
    from starling.export.checkpoints.gguf_checkpoint import open_gguf_checkpoint

    with pytest.raises(UnsupportedModelError, match=r"attention\.head_count_kv is not the same in all layers"):
        open_gguf_checkpoint(file, name="m")


def test_a_file_in_parts_is_read_as_the_whole(tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf", FAMILIES["qwen2"])
    write_gguf(tmp_path / "m.gguf", FAMILIES["qwen2"], parts=7)
    first, *others = sorted(tmp_path.glob("m-*.gguf"))
    assert len(others) >= 2
    whole, joined = open_checkpoint(str(tmp_path / "whole.gguf")), open_checkpoint(str(first))
    assert joined.name == "m"
    assert joined.tensors.names() == whole.tensors.names()
    for name in whole.tensors.names():
        assert torch.equal(rows_of(joined, name), rows_of(whole, name)), name


def test_a_later_part_and_a_missing_one_are_refused_by_name(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", FAMILIES["qwen2"], parts=7)
    first, second, *_ = sorted(tmp_path.glob("m-*.gguf"))
    with pytest.raises(CheckpointError, match=rf"{second.name} is part 2 of \d: give the first, .*{first.name}"):
        open_checkpoint(str(second))
    second.rename(tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match=rf"of which .*{second.name} is missing: get that one too"):
        open_checkpoint(str(first))
    with pytest.raises(CheckpointError, match=r"other\.gguf is a part, one of \d, but is not named"):
        open_checkpoint(str(tmp_path / "other.gguf"))


def test_parts_of_two_files_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", FAMILIES["qwen2"], parts=7)
    first, second, third, *_ = sorted(tmp_path.glob("m-*.gguf"))
    second.write_bytes(third.read_bytes())
    with pytest.raises(CheckpointError, match=rf"{second.name} has split\.no 2 and split\.count \d, its name says 1"):
        open_checkpoint(str(first))

"""Every choice about a checkpoint's tensors is transformers' own: files, names, fusing, tying, dtypes; none is lost."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from plain_checkpoints import edit_json
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

from starling.engine.errors import CheckpointError, UnsupportedModelError
from starling.export.check.source_model import load_folder_source
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.checkpoints.model_class import model_classes, names_in_whole, without_weights
from starling.export.checkpoints.model_source import open_checkpoint
from starling.export.tokenizers.starling_tokenizer import starling_tokenizer_json

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32002,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
Tensors = dict[str, torch.Tensor]


def of_type(model_type: str, **changes: Any) -> PreTrainedConfig:
    config: PreTrainedConfig = transformers.AutoConfig.for_model(model_type, **(SHAPE | changes))
    return config


# What is stored under other names, or in other pieces, than the model has.
MAPPED = {
    "embed_out": of_type("gpt_neox"),
    "experts-one-by-one": of_type("mixtral", **EXPERTS),
    "experts-and-router-renamed": of_type("granitemoe", **EXPERTS),
    "experts-beside-a-shared-one": of_type("qwen2_moe", **EXPERTS),
    "query-key-value-in-one": of_type("phi3"),
}


def save(folder: Path, config: PreTrainedConfig, model_class: Any = None, **options: Any) -> PreTrainedModel:
    """A small model whose tensors are all different, as transformers saves it, with a tokenizer beside it."""
    torch.manual_seed(0)
    build: Callable[..., PreTrainedModel]
    build = AutoModelForCausalLM.from_config if model_class is None else model_class._from_config
    model = build(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, **options)
    (folder / "tokenizer.json").write_text(starling_tokenizer_json(), encoding="utf-8")
    return model


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Write the stored tensors anew."""
    path = folder / "model.safetensors"
    save_file({n: t.contiguous() for n, t in change(load_file(path)).items()}, path, metadata={"format": "pt"})


def assert_transformers_has_the_same(checkpoint: Checkpoint, folder: Path) -> None:
    """Every tensor, whole and in part, and what is tied, against `from_pretrained`."""
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state = reference.state_dict(keep_vars=True)
    names = set(checkpoint.tensors.names())
    for name, expected in state.items():
        if name not in names:
            assert any(state[other] is expected for other in names), f"{name} is missing"
            continue
        assert checkpoint.tensors.shape(name) == tuple(expected.shape)
        count = len(expected)
        for start, stop in ((0, count), (count // 3, count - count // 4), (count, count + 5)):
            rows = checkpoint.tensors.rows(name, start, stop)
            assert rows.dtype in (torch.float32, torch.float16, torch.bfloat16)
            assert torch.equal(rows.float(), expected[start:stop]), f"{name}, rows {start}:{stop}"
    tied = reference.get_output_embeddings().weight is reference.get_input_embeddings().weight
    assert checkpoint.config.tie_word_embeddings == tied


@pytest.mark.parametrize("name", MAPPED)
def test_names_that_transformers_maps_are_mapped(tmp_path: Path, name: str) -> None:
    save(tmp_path, MAPPED[name], max_shard_size="300KB")
    assert_transformers_has_the_same(open_checkpoint(str(tmp_path)), tmp_path)


def test_of_stacked_experts_only_those_that_are_asked_for_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from starling.export.checkpoints.stored_tensors import SafetensorsFiles

    save(tmp_path, MAPPED["experts-one-by-one"])
    tensors = open_checkpoint(str(tmp_path)).tensors
    read: list[str] = []
    original = SafetensorsFiles.rows

    def rows(self: SafetensorsFiles, name: str, start: int, stop: int) -> torch.Tensor:
        read.append(name)
        return original(self, name, start, stop)

    monkeypatch.setattr(SafetensorsFiles, "rows", rows)
    assert tensors.rows("model.layers.1.mlp.experts.gate_up_proj", 2, 3).shape[0] == 1
    assert read == [f"model.layers.1.block_sparse_moe.experts.2.{name}.weight" for name in ("w1", "w3")]


def test_a_base_models_names_lack_the_prefix(tmp_path: Path) -> None:
    config = Qwen2Config(**SHAPE, tie_word_embeddings=True)
    save(tmp_path, config, transformers.Qwen2Model)
    assert "embed_tokens.weight" in load_file(tmp_path / "model.safetensors")
    assert_transformers_has_the_same(open_checkpoint(str(tmp_path)), tmp_path)


def test_a_base_model_whose_head_is_not_tied_lacks_a_head(tmp_path: Path) -> None:
    save(tmp_path, LlamaConfig(**SHAPE, tie_word_embeddings=False), transformers.LlamaModel)
    with pytest.raises(CheckpointError, match=r"has no tensor lm_head\.weight, which LlamaForCausalLM needs") as caught:
        open_checkpoint(str(tmp_path))
    assert "again" not in str(caught.value)


TIES: dict[str, tuple[bool, bool, Callable[[Tensors], Tensors]]] = {
    "said, and a head of its own": (False, True, lambda t: t),
    "said, and the embedding twice": (
        False,
        True,
        lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()},
    ),
    "said, and the head alone is stored": (
        False,
        True,
        lambda t: {n: x for n, x in t.items() if n != "model.embed_tokens.weight"},
    ),
    "not said, and the embedding twice": (
        False,
        False,
        lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()},
    ),
}


@pytest.mark.parametrize("case", TIES)
def test_the_head_is_tied_where_transformers_ties_it(tmp_path: Path, case: str) -> None:
    saved, said, change = TIES[case]
    save(tmp_path, LlamaConfig(**SHAPE, tie_word_embeddings=saved))
    rewrite(tmp_path, change)
    edit_json(tmp_path / "config.json", tie_word_embeddings=said)
    checkpoint = open_checkpoint(str(tmp_path))
    assert_transformers_has_the_same(checkpoint, tmp_path)
    assert any("an lm_head of its own" in note for note in checkpoint.notes) == (case == "said, and a head of its own")


def another_model(folder: Path, **options: Any) -> None:
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).save_pretrained(folder, **options)


def test_a_single_file_wins_over_an_index(tmp_path: Path) -> None:
    save(tmp_path, LlamaConfig(**SHAPE))
    single = (tmp_path / "model.safetensors").read_bytes()
    another_model(tmp_path, max_shard_size="300KB")
    (tmp_path / "model.safetensors").write_bytes(single)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert_transformers_has_the_same(open_checkpoint(str(tmp_path)), tmp_path)


def test_a_file_that_the_configuration_names_wins(tmp_path: Path) -> None:
    save(tmp_path, LlamaConfig(**SHAPE))
    (tmp_path / "model.safetensors").rename(tmp_path / "mine.safetensors")
    another_model(tmp_path)
    edit_json(tmp_path / "config.json", transformers_weights="mine.safetensors")
    assert_transformers_has_the_same(open_checkpoint(str(tmp_path)), tmp_path)


@pytest.mark.parametrize("named", ["../other.safetensors", "nowhere.safetensors"])
def test_a_named_file_outside_the_folder_or_absent_is_refused(tmp_path: Path, named: str) -> None:
    save(tmp_path, LlamaConfig(**SHAPE))
    edit_json(tmp_path / "config.json", transformers_weights=named)
    with pytest.raises(CheckpointError, match=r"which is no file name|is missing, which config\.json names"):
        open_checkpoint(str(tmp_path))


def test_what_an_index_leaves_out_is_taken_and_the_later_file_wins(tmp_path: Path) -> None:
    save(tmp_path, LlamaConfig(**SHAPE), max_shard_size="300KB")
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    last = tmp_path / sorted(set(weight_map.values()))[-1]
    del weight_map["model.norm.weight"]
    edit_json(index, weight_map=weight_map)
    save_file(load_file(last) | {"model.layers.0.input_layernorm.weight": torch.full((64,), 7.0)}, last)
    checkpoint = open_checkpoint(str(tmp_path))
    assert_transformers_has_the_same(checkpoint, tmp_path)
    assert checkpoint.tensors.rows("model.layers.0.input_layernorm.weight", 0, 1) == 7


def test_floats_of_any_width_are_read(tmp_path: Path) -> None:
    widths = {"q_proj": torch.float64, "k_proj": torch.float16, "v_proj": torch.bfloat16, "o_proj": torch.float8_e4m3fn}
    save(tmp_path, LlamaConfig(**SHAPE))
    rewrite(
        tmp_path, lambda t: {n: x.to(next((d for w, d in widths.items() if w in n), x.dtype)) for n, x in t.items()}
    )
    assert_transformers_has_the_same(open_checkpoint(str(tmp_path)), tmp_path)


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["float64", "bfloat16", None])
def test_the_dtype_that_config_json_names_changes_no_tensor(tmp_path: Path, field: str, value: str | None) -> None:
    save(tmp_path, LlamaConfig(**SHAPE))
    document = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    document.pop("dtype", None)
    (tmp_path / "config.json").write_text(json.dumps(document | {field: value}), encoding="utf-8")
    assert_transformers_has_the_same(open_checkpoint(str(tmp_path)), tmp_path)


def test_buffers_that_the_model_makes_itself_are_left_out_with_a_word(tmp_path: Path) -> None:
    save(tmp_path, MAPPED["embed_out"])
    buffers = {
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(4),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8),
        "gpt_neox.embeddings.position_ids": torch.arange(128),
        "gpt_neox.steps": torch.tensor(5),
    }
    rewrite(tmp_path, lambda t: t | buffers)
    checkpoint = open_checkpoint(str(tmp_path))
    assert_transformers_has_the_same(checkpoint, tmp_path)
    assert set(checkpoint.left_out) == set(buffers)
    assert [note for note in checkpoint.notes if note.startswith("left out: 5 tensors that the model makes itself")]


WITHOUT_A_PLACE = {
    "model.layers.0.self_attn.q_proj.lora_A.default.weight": "merge the adapter",
    "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": "merge the adapter",
    "model.layers.0.self_attn.q_proj.bias": "config.json denies this bias",
    "model.layers.0.mlp.adapter_down.weight": "merge the adapter",
    "score.weight": "config.json is a language model's, this is a head for scores",
    "v_head.summary.weight": "config.json is a language model's, this is a head for scores",
    "model.layers.0.self_attn.q_proj.weight_scale": "the weights are quantized",
    "model.layers.3.self_attn.q_proj.weight": "config.json is of another model",
    "model.layers.0.self_attn.q_norm.weight": "config.json is of another model",
    "prompt_embeddings": "config.json is of another model",
    "model.layers.0.self_attn.bias": "config.json denies this bias",
}


@pytest.mark.parametrize("name", WITHOUT_A_PLACE)
def test_a_tensor_without_a_place_is_refused_by_name(tmp_path: Path, name: str) -> None:
    save(tmp_path, LlamaConfig(**SHAPE))
    rewrite(tmp_path, lambda t: t | {name: torch.ones(64)})
    with pytest.raises(UnsupportedModelError, match=f"has no place for tensor {name}: {WITHOUT_A_PLACE[name]}"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("part", ["weight_g_idx", "weight_zero_point", "qzeros"])
def test_whole_numbers_of_quantized_weights_are_no_tables_of_the_model(tmp_path: Path, part: str) -> None:
    save(tmp_path, LlamaConfig(**SHAPE))
    rewrite(tmp_path, lambda t: t | {f"model.layers.0.self_attn.q_proj.{part}": torch.arange(64)})
    with pytest.raises(UnsupportedModelError, match=rf"has no place for tensor .*{part}: the weights are quantized"):
        open_checkpoint(str(tmp_path))


def test_an_adapter_around_the_weights_is_named_before_what_is_missing(tmp_path: Path) -> None:
    save(tmp_path, LlamaConfig(**SHAPE))
    rewrite(tmp_path, lambda t: {n.replace("q_proj.weight", "q_proj.base_layer.weight"): x for n, x in t.items()})
    with pytest.raises(
        UnsupportedModelError, match=r"3 tensors, such as .*q_proj\.base_layer\.weight: merge the adapter"
    ):
        open_checkpoint(str(tmp_path))


def test_integers_where_the_model_has_weights_are_refused(tmp_path: Path) -> None:
    save(tmp_path, LlamaConfig(**SHAPE))
    rewrite(tmp_path, lambda t: {n: x.to(torch.int8) if "q_proj" in n else x for n, x in t.items()})
    with pytest.raises(UnsupportedModelError, match=r"q_proj\.weight holds integers"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    "architecture", ["LlamaForQuestionAnswering", "LlamaForTokenClassification", "InternLM2ForRewardModel"]
)
def test_a_model_with_another_head_is_refused_by_name(tmp_path: Path, architecture: str) -> None:
    save(tmp_path, LlamaConfig(**SHAPE))
    edit_json(tmp_path / "config.json", architectures=[architecture])
    with pytest.raises(UnsupportedModelError, match=f"is a {architecture}, which gives neither a next token nor"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("beside_a_model", [True, False], ids=["beside-a-model", "alone"])
def test_an_adapters_folder_says_what_it_is(tmp_path: Path, beside_a_model: bool) -> None:
    if beside_a_model:
        save(tmp_path, LlamaConfig(**SHAPE))
    settings = {"base_model_name_or_path": "org/base", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    what = "holds a LORA adapter of org/base beside the model" if beside_a_model else "is a LORA adapter of org/base"
    with pytest.raises(UnsupportedModelError, match=rf"{what}.*adapter_config\.json.*merge it into the model"):
        open_checkpoint(str(tmp_path))


def pixtral(**changes: Any) -> PreTrainedConfig:
    text = SHAPE | {"head_dim": 16, "model_type": "mistral"}
    return transformers.Mistral3Config(
        text_config=text, vision_config=VISION | {"model_type": "pixtral", "head_dim": 16}, **changes
    )


SEEING = {
    "a text model that has a class": lambda: transformers.Gemma3Config(
        text_config=SHAPE | {"head_dim": 16}, vision_config=VISION | {"vision_use_head": False}, mm_tokens_per_image=4
    ),
    "a text model of another type": lambda: pixtral(tie_word_embeddings=False),
    "tied": lambda: pixtral(tie_word_embeddings=True),
    "a whole language model": lambda: transformers.Llama4Config(
        text_config=SHAPE | {"num_local_experts": 2, "intermediate_size_mlp": 96, "head_dim": 16},
        vision_config=VISION | dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 64),
    ),
}


def test_settings_of_a_quantization_may_be_those_of_the_text_model(tmp_path: Path) -> None:
    save(tmp_path, config := pixtral(), model_classes(config).loaded)
    name, settings = "language_model.model.layers.0.self_attn.q_proj", {"quant_method": "fp8"}
    codes = torch.ones(64, 64).to(torch.float8_e4m3fn)
    rewrite(tmp_path, lambda t: t | {f"{name}.weight": codes, f"{name}.weight_scale": torch.tensor(0.5)})
    written = json.loads((tmp_path / "config.json").read_text())
    written["text_config"]["quantization_config"] = settings
    (tmp_path / "config.json").write_text(json.dumps(written))
    checkpoint = open_checkpoint(str(tmp_path))
    source = load_folder_source(checkpoint, tmp_path)
    own = "model.layers.0.self_attn.q_proj.weight"
    for values in (checkpoint.tensors.rows(own, 0, 64), source.model.state_dict()[source.names[own]]):
        assert torch.equal(values, torch.full((64, 64), 0.5))
    assert not hasattr(source.config, "quantization_config")


@pytest.mark.parametrize("case", SEEING)
def test_of_a_model_that_sees_the_language_model_is_taken_and_the_rest_noted(tmp_path: Path, case: str) -> None:
    config = SEEING[case]()
    classes = model_classes(config)
    expected = save(tmp_path, config, classes.loaded).state_dict()
    checkpoint = open_checkpoint(str(tmp_path))
    part = without_weights(classes.language_model, classes.text_config)
    names = names_in_whole(expected_model := classes.loaded.from_pretrained(tmp_path, dtype=torch.float32), part)
    for name in checkpoint.tensors.names():
        assert torch.equal(checkpoint.tensors.rows(name, 0, 32002).float(), expected[names[name]])
    assert set(names) - set(checkpoint.tensors.names()) <= {"lm_head.weight"}
    tied = expected_model.get_output_embeddings().weight is expected_model.get_input_embeddings().weight
    assert checkpoint.config.tie_word_embeddings == tied
    assert checkpoint.config.model_type == classes.text_config.model_type
    assert any("tensors beside the language model's" in note for note in checkpoint.notes)

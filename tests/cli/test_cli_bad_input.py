"""Bad input gets one line that says what is wrong and what to do, and the right exit code: 2 a mistake, 1 a failure."""

import errno
import json
from pathlib import Path

import pytest
from command_line import (
    copy_bundle,
    edit_manifest,
    install_hint,
    python_without,
    refusal,
    replace_file,
    replace_recorded,
    starling,
    succeed,
)

from starling.cli.shared.failures import describe

pytestmark = pytest.mark.slow


@pytest.fixture
def copied(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of a good bundle, to be damaged."""
    return copy_bundle(tiny_bundle, tmp_path / "copied")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    line = refusal("generate", tmp_path / "nowhere", "Hello")
    assert line.endswith(f"nowhere: no such folder; make a bundle with: starling export MODEL {tmp_path}/nowhere")


def test_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    assert "is not a bundle (no bundle.json)" in refusal("inspect", tmp_path)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json"])
def test_a_missing_file(name: str, copied: Path) -> None:
    (copied / name).unlink()
    line = refusal("generate", copied, "Hello")
    assert line == f"{copied / name} is missing from the bundle; copy the bundle again or export it again"


def test_a_truncated_file(copied: Path) -> None:
    weights = copied / "model.onnx.data"
    replace_file(weights, weights.read_bytes()[: 2**20])
    line = refusal("generate", copied, "Hello")
    assert "model.onnx.data is truncated: 1,048,576 bytes where bundle.json says 93,874,176" in line


def test_an_altered_graph(copied: Path) -> None:
    graph = copied / "model.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    replace_file(graph, bytes(content))
    assert "model.onnx is altered: SHA-256" in refusal("generate", copied, "Hello")


def test_altered_weights_are_found_by_verify(copied: Path) -> None:
    weights = copied / "model.onnx.data"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    replace_file(weights, bytes(content))
    assert "model.onnx.data is altered: SHA-256" in refusal("generate", copied, "Hello", "--verify")
    assert "model.onnx.data is altered: SHA-256" in refusal("inspect", copied, "--verify")


def test_a_manifest_that_is_not_json(copied: Path) -> None:
    replace_file(copied / "bundle.json", b'{"format": "starling-bu')
    assert "bundle.json is not JSON" in refusal("inspect", copied)


def test_a_bundle_of_a_newer_format(copied: Path) -> None:
    edit_manifest(copied, format_version=3)
    line = refusal("generate", copied, "Hello")
    assert line == f"{copied} is a bundle of format 3, this Starling reads up to 2: upgrade Starling"


@pytest.mark.parametrize("command", ["generate", "tokenize"])
def test_a_tokenizer_with_an_id_beyond_the_vocabulary(command: str, copied: Path) -> None:
    tokenizer = json.loads((copied / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": 32002, "content": "<sep>"})
    replace_recorded(copied, "tokenizer.json", json.dumps(tokenizer).encode())
    line = refusal(command, copied, "Hello")
    assert "has token '<sep>' with id 32002, but the model knows ids below 32002" in line


def test_a_prompt_longer_than_the_cache(tiny_bundle: Path) -> None:
    line = refusal("generate", tiny_bundle, "--raw", "word " * 40, "--max-seq", "32")
    assert line == (
        "the prompt has 42 tokens, but the KV cache holds 32: shorten it, or raise --max-seq (this model: up to 8192)"
    )


def test_a_cache_longer_than_the_model(tiny_bundle: Path) -> None:
    assert "this model has 8192 positions" in refusal("generate", tiny_bundle, "Hello", "--max-seq", "9000")
    assert "this model has 8192 positions" in refusal("inspect", tiny_bundle, "--max-seq", "9000")


@pytest.mark.parametrize("arguments", [[""], ["-"], ["--ids", ""]], ids=["argument", "stdin", "ids"])
def test_an_empty_prompt(arguments: list[str], tiny_bundle: Path) -> None:
    assert refusal("generate", tiny_bundle, *arguments).startswith("the prompt is empty")


def test_no_prompt_or_too_many(tiny_bundle: Path) -> None:
    assert refusal("generate", tiny_bundle).startswith("no prompt: give a text, - to read stdin")
    assert "choose one" in refusal("generate", tiny_bundle, "Hello", "--ids", "1,2")
    assert "give either a text" in refusal("tokenize", tiny_bundle)
    assert "names no role" in refusal("tokenize", tiny_bundle, "--turn", "Hello")


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ("1,32002", "token id 32002 at position 1 is outside the model's vocabulary (0 to 32001)"),
        ("-1", "token id -1 at position 0 is outside"),
        ("1,two", "is no list of token ids"),
    ],
)
def test_token_ids_outside_the_vocabulary(ids: str, expected: str, tiny_bundle: Path) -> None:
    assert expected in refusal("generate", tiny_bundle, "--ids", ids)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--temperature", "-1", "temperature is -1.0: give a number 0 (greedy) or more"),
        ("--temperature", "nan", "temperature is nan: give a number"),
        ("--top-k", "-2", "top_k is -2: give a whole number"),
        ("--presence-penalty", "2.5", "presence_penalty is 2.5: give a number from -2 to 2"),
        ("--min-tokens", "999", "min_tokens is 999, but max_tokens is 256"),
        ("--top-p", "0", "top_p is 0.0: give a number above 0 and at most 1"),
        ("--min-p", "2", "min_p is 2.0: give a number from 0 to 1"),
        ("--repetition-penalty", "0", "repetition_penalty is 0.0: give a number from 1e-06 to 1e+06"),
        ("--max-tokens", "-1", "max_tokens is -1: give a whole number, 0 or more"),
        ("--seed", "-2", "seed is -2: give a whole number"),
        ("--logprobs", "-1", "logprobs is -1: give a whole number"),
        ("--stop", "", "stop[0] is '': give a string that is not empty"),
        ("--temperature", "warm", "Invalid value for '--temperature': 'warm' is not a valid float"),
        ("--threads", "0", "Invalid value for '--threads'"),
        ("--backend", "tpu", "Invalid value for '--backend'"),
        ("--nonsense", "1", "No such option"),
    ],
)
def test_impossible_settings(option: str, value: str, expected: str, tiny_bundle: Path) -> None:
    assert expected in refusal("generate", tiny_bundle, "Hello", option, value)


def test_templates_that_do_not_fit(tiny_bundle: Path, copied: Path) -> None:
    assert "there is no chat template 'poem'" in refusal("generate", tiny_bundle, "Hello", "--template", "poem")
    assert "--raw takes no chat template" in refusal("generate", tiny_bundle, "Hi", "--raw", "--system", "Be brief.")
    assert "--template is for a chat" in refusal("tokenize", tiny_bundle, "Hello", "--template", "code")
    (copied / "chat_template.jinja").unlink()
    (copied / "additional_chat_templates" / "code.jinja").unlink()
    (copied / "additional_chat_templates" / "math.jinja").unlink()
    kept = {name: entry for name, entry in _files(copied).items() if not name.endswith(".jinja")}
    edit_manifest(copied, files=kept)
    assert "this bundle has no chat template" in refusal("generate", copied, "Hello", "--chat")
    assert starling("generate", copied, "Hello", "--max-tokens", "1").returncode == 0


def test_text_that_is_not_utf_8(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes(b"caf\xe9")
    line = refusal("generate", tiny_bundle, "--prompt-file", tmp_path / "prompt.txt")
    assert line.endswith("prompt.txt is not UTF-8 text (byte 0xe9 at offset 3): convert it to UTF-8")
    assert "stdin is not UTF-8 text" in refusal("generate", tiny_bundle, "-", stdin=b"caf\xe9")
    assert "stdin is not UTF-8 text" in refusal("chat", tiny_bundle, stdin=b"caf\xe9\n")
    assert "cannot be read: No such file" in refusal("generate", tiny_bundle, "--prompt-file", tmp_path / "none")


def test_an_unknown_command_or_a_missing_argument() -> None:
    assert refusal("exprot") == "No such command 'exprot' (did you mean 'export'?); see: starling --help"
    assert refusal("frobnicate") == "No such command 'frobnicate'; see: starling --help"
    assert refusal("generate") == "Missing argument 'BUNDLE'; see: starling generate --help"


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    finished = starling("--debug", "inspect", tmp_path)
    assert finished.returncode == 2
    assert "Traceback" in finished.stderr
    assert "BundleError" in finished.stderr


def test_without_onnxruntime_only_what_runs_the_model_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    python = python_without(tmp_path / "venv", "onnxruntime")
    line = refusal("generate", tiny_bundle, "Hello", code=1, python=python)
    assert line == (
        "onnxruntime is not installed (No module named 'onnxruntime'): "
        f"{install_hint('cpu')}, or {install_hint('gpu')} for CUDA"
    )
    assert starling("tokenize", tiny_bundle, "Hello", python=python).stdout == succeed("tokenize", tiny_bundle, "Hello")
    assert "not usable: onnxruntime is not installed" in starling("doctor", python=python).stdout


def test_without_the_export_extra(tmp_path: Path) -> None:
    python = python_without(tmp_path / "venv", "torch")
    line = refusal("export", "demo", tmp_path / "out", code=1, python=python)
    assert line == f"exporting needs the package torch, which is not installed: {install_hint('export')}"
    assert f"needs torch: {install_hint('export')}" in starling("doctor", python=python).stdout
    # Before anything is fetched, whatever the model.
    for model in ("some-one/some-model", "random:starling-tiny"):
        assert refusal("export", model, tmp_path / "out", code=1, python=python) == line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "out of memory: free some, or ask for less (--max-seq, a smaller model or dtype)"),
        (OSError(errno.ENOSPC, "No space left on device", "out.json"), "out.json: No space left on device; free space"),
        (PermissionError(errno.EACCES, "Permission denied", "out.json"), "out.json: Permission denied"),
        (ModuleNotFoundError("x", name="onnx_ir.passes"), "exporting needs the package onnx_ir"),
        (ModuleNotFoundError("x", name="rich"), "the package rich is not installed: pip install"),
        (KeyError("layers"), "unexpected KeyError: 'layers'; run `starling --debug …` for the traceback"),
    ],
)
def test_failures_that_nobody_foresaw(error: Exception, line: str) -> None:
    message, code = describe(error)
    assert message.startswith(line)
    assert code == 1


def _files(bundle: Path) -> dict[str, dict[str, object]]:
    files: dict[str, dict[str, object]] = json.loads((bundle / "bundle.json").read_text())["files"]
    return files

"""A bundle is opened with typed fields, and anything wrong with its files is said in one line."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from starling.engine.bundle.manifest import ALWAYS_HASHED_BYTES, Bundle
from starling.engine.errors import BundleError


@pytest.fixture
def copied(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of its own, to be broken."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = json.loads((folder / "bundle.json").read_text())
    change(raw)
    (folder / "bundle.json").write_text(json.dumps(raw))


def refusal(folder: Path, *, verify: bool = False) -> str:
    """The one line with which opening fails."""
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder, verify=verify)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_fields_are_those_of_the_file(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle, verify=True)
    raw = json.loads((tiny_bundle / "bundle.json").read_text())
    assert bundle.raw == raw
    assert bundle.architecture.vocab_size == raw["architecture"]["vocab_size"]
    assert bundle.architecture.class_name == raw["architecture"]["class"]
    assert (bundle.dialect, bundle.dtype, bundle.quantization) == ("ort", "fp32", None)
    assert bundle.tokens.eos == tuple(raw["tokens"]["eos"])
    assert bundle.graph.outputs[0].name == "logits"
    assert bundle.graph_path.is_file()
    assert bundle.kv_cache.bytes_per_token == raw["kv_cache"]["bytes_per_token"]


def test_quantization_is_typed(copied: Path) -> None:
    settings = {"scheme": "int8", "block_size": 32, "symmetric": False, "accuracy_level": 4}
    edit(copied, lambda raw: raw.update(quantization=settings))
    quantization = Bundle.open(copied).quantization
    assert quantization is not None
    assert (quantization.scheme, quantization.block_size, quantization.symmetric) == ("int8", 32, False)


def test_a_whole_number_passes_for_a_float_and_nothing_else_does(copied: Path) -> None:
    settings: dict[str, Any] = {"scheme": "w8a8", "block_size": None, "symmetric": True, "accuracy_level": None}
    edit(copied, lambda raw: raw.update(quantization={**settings, "smoothing": 1}))
    quantization = Bundle.open(copied).quantization
    assert quantization is not None
    assert quantization.smoothing == 1.0
    for wrong in (True, "1", [1.0]):
        edit(copied, lambda raw, wrong=wrong: raw.update(quantization={**settings, "smoothing": wrong}))
        assert "quantization.smoothing is" in refusal(copied)
        assert "not a number" in refusal(copied)


def test_missing_folder_names_the_export_command(tmp_path: Path) -> None:
    assert "no such folder; make a bundle with: starling export" in refusal(tmp_path / "nothing")


def test_folder_without_bundle_json_is_no_bundle(tmp_path: Path) -> None:
    assert "is not a bundle (no bundle.json); make one with: starling export" in refusal(tmp_path)


def test_a_file_is_no_bundle(tiny_bundle: Path) -> None:
    assert "is not a bundle" in refusal(tiny_bundle / "model.onnx")


@pytest.mark.parametrize("content", ["{", "\x00", '{"format": "starling-bundle"'])
def test_bundle_json_that_is_not_json(copied: Path, content: str) -> None:
    (copied / "bundle.json").write_text(content)
    assert "bundle.json is not JSON" in refusal(copied)


@pytest.mark.parametrize("content", ["{}", '{"format": "other", "format_version": 1}'])
def test_json_of_something_else(copied: Path, content: str) -> None:
    (copied / "bundle.json").write_text(content)
    assert 'does not say "format": "starling-bundle"' in refusal(copied)


@pytest.mark.parametrize("content", ["[]", "3", "null", '"text"'])
def test_json_of_no_object(copied: Path, content: str) -> None:
    (copied / "bundle.json").write_text(content)
    assert "bundle.json is not a JSON object" in refusal(copied)


def test_newer_format_asks_for_an_upgrade(copied: Path) -> None:
    edit(copied, lambda raw: raw.update(format_version=3))
    assert "is a bundle of format 3, this Starling reads up to 2: upgrade" in refusal(copied)


@pytest.mark.parametrize("version", [None, "1", 0, True, 1.0])
def test_format_version_that_is_no_version(copied: Path, version: object) -> None:
    edit(copied, lambda raw: raw.update(format_version=version))
    assert f"has format_version {version!r}" in refusal(copied)


def test_missing_file_is_named(copied: Path) -> None:
    (copied / "model.onnx.data").unlink()
    assert "model.onnx.data is missing from the bundle" in refusal(copied)


def test_truncated_file_is_told_with_both_sizes(copied: Path) -> None:
    data = copied / "model.onnx.data"
    size = data.stat().st_size
    os.truncate(data, size - 1)
    assert f"model.onnx.data is truncated: {size - 1:,} bytes where bundle.json says {size:,}" in refusal(copied)


def test_longer_file_is_altered(copied: Path) -> None:
    with (copied / "tokenizer.json").open("ab") as file:
        file.write(b" ")
    assert "tokenizer.json is altered" in refusal(copied)


def test_altered_file_of_the_same_size_is_found(copied: Path) -> None:
    with (copied / "model.onnx").open("r+b") as file:
        file.seek(100)
        byte = file.read(1)[0]
        file.seek(100)
        file.write(bytes([byte ^ 1]))
    assert "model.onnx is altered: SHA-256" in refusal(copied)


def test_large_files_are_hashed_only_on_demand(copied: Path) -> None:
    size = ALWAYS_HASHED_BYTES + 1
    with (copied / "large.bin").open("wb") as file:
        file.truncate(size)  # sparse: takes no disk
    wrong = hashlib.sha256(b"").hexdigest()
    edit(copied, lambda raw: raw["files"].update({"large.bin": {"bytes": size, "sha256": wrong}}))
    Bundle.open(copied)
    assert "large.bin is altered" in refusal(copied, verify=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: raw.pop("architecture"), "architecture is 'None', not an object"),
        (lambda raw: raw["architecture"].pop("vocab_size"), "architecture.vocab_size is 'None', not a number"),
        (lambda raw: raw["architecture"].update(layers="two"), "architecture.layers is 'two', not a number"),
        (lambda raw: raw["architecture"].update(layers=True), "architecture.layers is 'True', not a number"),
        (lambda raw: raw["architecture"].update(kv_heads=-1), "architecture.kv_heads is '-1', not a number >= 0"),
        (lambda raw: raw["architecture"].update(tied_embeddings=1), "architecture.tied_embeddings is '1', not true or"),
        (lambda raw: raw.update(dialect="tensorflow"), "dialect is 'tensorflow', not one of ort, canonical, tensorrt"),
        (lambda raw: raw.update(reference_graph="lost.onnx"), "reference_graph is 'lost.onnx', not one of the files"),
        (lambda raw: raw.update(dtype="fp8"), "dtype is 'fp8', not one of fp32, fp16, bf16"),
        (lambda raw: raw.update(quantization=[]), "quantization is '[]', not an object"),
        (lambda raw: raw["graph"].update(inputs={}), "graph.inputs is '{}', not a list"),
        (lambda raw: raw["graph"]["inputs"][1].pop("name"), "graph.inputs[1].name is 'None', not a string"),
        (lambda raw: raw["graph"].update(file="other.onnx"), "graph.file is 'other.onnx', not one of the files"),
        (lambda raw: raw["tokens"].update(eos=[2, "x"]), "tokens.eos is"),
        (lambda raw: raw["files"].update({"../x": {"bytes": 0, "sha256": ""}}), "files is '../x', not a name inside"),
        (lambda raw: raw["files"].update({"x": 3}), "files.x is '3', not an object"),
        (lambda raw: raw["files"].update({"/x": {"bytes": 0, "sha256": ""}}), "files is '/x', not a name inside"),
        (lambda raw: raw["files"].update({"a\0b": {"bytes": 0, "sha256": ""}}), "not a name inside"),
        (lambda raw: raw["architecture"].update(layers=10**7), "layers is '10000000', not a number from 1 to 4096"),
        (lambda raw: raw["architecture"].update(layers=0), "architecture.layers is '0', not a number from 1"),
        (lambda raw: raw["architecture"].update(layers=3), "layers is '3', not that of the graph, which has 4 past"),
        (lambda raw: raw["architecture"].update(vocab_size=10**13), "vocab_size is '10000000000000', not a number"),
        (lambda raw: raw["architecture"].update(vocab_size=100), "graph.outputs: logits is"),
        (lambda raw: raw["architecture"].update(head_dim=16), "graph.inputs: past_key_values.0.key is"),
        (lambda raw: raw["architecture"].update(kv_heads=10**9), "kv_heads is '1000000000', not a number from 1 to"),
        (lambda raw: raw["architecture"].update(max_positions=2**31), "max_positions is '2147483648', not a number"),
        (lambda raw: raw["kv_cache"].update(bytes_per_token=1), "kv_cache.bytes_per_token is '1', not 16384"),
        (lambda raw: raw["kv_cache"].update(dtype="float16"), "is 'float32', not float16, as kv_cache says"),
        (lambda raw: raw["tokens"].update(eos=[10**6]), "tokens is '1000000', not an id below 32002"),
        (lambda raw: raw["weights"].update(bytes=2**64), "weights.bytes is '18446744073709551616', not a number"),
        (lambda raw: raw["graph"]["inputs"][0].update(shape=[-1]), "graph.inputs[0].shape is '[-1]', not a list of"),
    ],
)
def test_bad_fields_are_named(copied: Path, change: Callable[[dict[str, Any]], object], said: str) -> None:
    edit(copied, change)
    assert said in refusal(copied)


@pytest.mark.parametrize("name", ["notes.txt", "additional_chat_templates/x.jinja", "engines/a.plan"])
def test_a_file_that_bundle_json_does_not_list_is_a_file(copied: Path, name: str) -> None:
    file = copied / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("text")
    Bundle.open(copied)
    file.unlink()
    os.mkfifo(file)
    assert f"{file.name} is neither a file nor a folder: remove it" in refusal(copied)
    file.unlink()
    file.symlink_to("/dev/zero")
    assert f"{file.name} is a link to /dev/zero, outside the folder" in refusal(copied)


def test_a_listed_file_that_links_out_of_the_folder_is_refused(copied: Path, tmp_path: Path) -> None:
    moved = (copied / "chat_template.jinja").rename(tmp_path / "outside.jinja")
    (copied / "chat_template.jinja").symlink_to(moved)
    assert "chat_template.jinja is a link to" in refusal(copied)


def test_a_bundle_json_of_any_size_or_none_is_a_line(copied: Path) -> None:
    file = copied / "bundle.json"
    os.truncate(file, 2**40)
    assert "bundle.json has 1,099,511,627,776 bytes, more than" in refusal(copied)
    file.write_text('{"a":' * 200_000)
    assert "nests deeper" in refusal(copied)

"""`starling export` leaves a whole bundle or nothing, and says in one line why there is none."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from command_line import document, end, read_until, refusal, running, starling, succeed
from safetensors.numpy import save_file

pytestmark = pytest.mark.slow

TINY = "random:starling-tiny"
HUB_OFFLINE = {"HF_ENDPOINT": "http://127.0.0.1:9"}


def test_an_export_shows_its_phases_and_what_to_do_next(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "tiny"
    finished = starling("export", TINY, out, "--quant", "int8", "--block-size", "64", "--symmetric", "--check")
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.splitlines() == [
        "loading PyTorch",
        f"opening {TINY}",
        "tracing starling-tiny",
        "writing weights",
        "comparing with PyTorch",
    ]
    first, parity, *_, last = finished.stdout.splitlines()
    assert "int8 weights (block 64, symmetric, accuracy level 4), fp32, ort dialect" in first
    for figure in ("max |Δlogit|", "KL mean", "top-1 agreement", "perplexity"):
        assert figure in parity
    assert last == f'next: starling generate {out} "What is the capital of South Korea?"'
    assert document("inspect", out)["quantization"]["block_size"] == 64
    succeed("generate", out, "Hello", "--max-tokens", "2")


def test_ctrl_c_in_an_export_leaves_nothing(tmp_path: Path) -> None:
    with running("export", TINY, tmp_path / "out") as process:
        read_until(process.stderr, b"tracing")
        assert [path.name for path in tmp_path.iterdir()] == [f".out.partial-{process.pid}"]
        code, out, errors = end(process, signal.SIGINT)
    assert code == 130
    assert out == ""
    assert errors.strip().splitlines()[-1] == "error: interrupted"
    assert list(tmp_path.iterdir()) == []


def test_sigterm_in_an_export_leaves_nothing(tmp_path: Path) -> None:
    with running("export", TINY, tmp_path / "out") as process:
        read_until(process.stderr, b"tracing")
        code, _, _ = end(process, signal.SIGTERM)
    assert code == 143
    assert list(tmp_path.iterdir()) == []


SIGNAL_IN_A_DESTRUCTOR = """
import os, signal, sys, time
from starling.cli import command_group

class Node:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)

def command(*arguments, **options):
    del node[:]
    time.sleep(60)

node = [Node()]
command_group.starling.main = command
sys.exit(command_group.run())
"""


def test_sigterm_in_a_destructor_ends_the_command_too() -> None:
    finished = subprocess.run([sys.executable, "-c", SIGNAL_IN_A_DESTRUCTOR], capture_output=True, timeout=50)
    assert (finished.returncode, finished.stderr) == (143, b"")


def test_a_killed_export_leaves_no_bundle_and_the_next_one_works(tmp_path: Path) -> None:
    with running("export", TINY, tmp_path / "out", "--check") as process:
        read_until(process.stderr, b"comparing")  # everything is written by then, but not in its place
        end(process, signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    manifest = document("export", TINY, tmp_path / "out")
    assert manifest["folder"] == str(tmp_path / "out")
    assert manifest["architecture"] == json.loads((tmp_path / "out" / "bundle.json").read_text())["architecture"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_too_small_for_the_bundle(small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("size=8m")
    line = refusal("export", TINY, disk / "out", code=1)
    assert line == f"not enough disk space in {disk}: the bundle needs 0.16 GB, 0.01 GB are free"
    assert list(disk.iterdir()) == []


def test_a_disk_that_is_full_while_writing(small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("nr_inodes=4")  # room for the weights, none for all the files
    line = refusal("export", TINY, disk / "out", code=1)
    assert line == (f"the disk is full: writing {disk}/out stopped and nothing was left behind; free space and retry")
    assert list(disk.iterdir()) == []


def test_a_folder_that_exists_is_refused_before_pytorch_is_loaded(tmp_path: Path) -> None:
    finished = starling("export", TINY, tmp_path)
    assert finished.returncode == 2
    assert finished.stderr == f"error: {tmp_path} exists; give another folder, or --force to replace the bundle in it\n"


CONFIG = {"config.json": '{"model_type": "llama"}'}
BEFORE_PYTORCH = {
    "a folder that is not there": ({}, ("./nosuch",), "'./nosuch' is no model: give"),
    "a word": ({}, ("nowhere",), "'nowhere' is no model: give"),
    "a file that is not there": ({}, ("m.gguf",), "m.gguf cannot be read: No such file"),
    "a file of another kind": (
        {"m.gguf": "PK" * 40},
        ("m.gguf",),
        "m.gguf is truncated or no GGUF file (it starts with",
    ),
    "weights alone": ({"m.safetensors": "x"}, ("m.safetensors",), "is a file, but no .gguf file: give the folder"),
    "an empty folder": ({}, (".",), "config.json is missing: give the folder of a whole checkpoint"),
    "a bundle": ({"bundle.json": "{}"}, (".",), "is a bundle, which an export has made: give the checkpoint"),
    "a folder with a GGUF file": ({"a.gguf": ""}, (".",), "has no config.json, but a.gguf: give that file, "),
    "a configuration alone": (CONFIG, (".",), "has neither model.safetensors nor model.safetensors.index.json"),
    "a broken configuration": ({"config.json": "{"}, (".",), "config.json is not JSON"),
    "a pickle": ({**CONFIG, "pytorch_model.bin": ""}, (".",), "has only pytorch_model.bin, a pickle"),
    "a pointer in place of weights": (
        {**CONFIG, "model.safetensors": "version https://git-lfs.github.com/spec/v1"},
        (".",),
        "model.safetensors is truncated or altered",
    ),
    "quantized weights": (
        {"config.json": '{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}'},
        (".",),
        "is quantized with bits None; read is 4, 8",
    ),
    "an unknown name": (
        {},
        ("random:starling-8b",),
        "'random:starling-8b' is not built in: use one of random:starling-7b",
    ),
    "a revision of a folder": ({}, (".", "--revision", "v1"), "--revision v1 is for a hub id, which '.' is not"),
    "an impossible block": ({}, (TINY, "--quant", "int4", "--block-size", "50"), "block size 50 is not one of"),
    "an impossible level": ({}, (TINY, "--quant", "int8", "--accuracy-level", "9"), "accuracy level 9 is not between"),
    "a dialect without quantization": (
        {},
        (TINY, "--quant", "int8", "--dialect", "canonical"),
        "is full precision only",
    ),
    "an impossible smoothing": (
        {},
        (TINY, "--dialect", "tensorrt", "--quant", "w8a8", "--smoothing", "2"),
        "smoothing 2 is not between 0 (none) and 1",
    ),
    "a text that is not there": (
        {},
        (TINY, "--dialect", "tensorrt", "--quant", "w8a8", "--calibration", "no.txt"),
        "no.txt: no such file",
    ),
    "a text that is no text": (
        {"lines.jsonl": '{"title": 1}'},
        (TINY, "--dialect", "tensorrt", "--quant", "w8a8", "--calibration", "lines.jsonl"),
        'lines.jsonl, line 1 has neither "text" nor "messages"',
    ),
}
WITHOUT_PYTORCH = (
    "import sys; from starling.cli.main import main; code = main(sys.argv[1:]); "
    "sys.exit('PyTorch was loaded' if 'torch' in sys.modules else code)"
)


def refused_without_pytorch(cwd: Path, *arguments: str | Path, env: Mapping[str, str] | None = None) -> list[str]:
    """The lines with which `starling export ARGUMENTS…` refuses, where it does so before it loads PyTorch."""
    command = [sys.executable, "-c", WITHOUT_PYTORCH, "export", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, check=False
    )
    assert done.returncode in (1, 2)
    assert "loaded" not in done.stderr
    assert done.stdout == ""
    return done.stderr.splitlines()


@pytest.mark.parametrize("case", BEFORE_PYTORCH)
def test_what_can_be_refused_without_pytorch_is(case: str, tmp_path: Path) -> None:
    files, arguments, expected = BEFORE_PYTORCH[case]
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    [line] = refused_without_pytorch(tmp_path, arguments[0], "out", *arguments[1:])
    assert line.startswith("error: ")
    assert expected in line
    assert {path.name for path in tmp_path.iterdir()} == set(files)


def test_a_hub_that_cannot_be_asked_is_known_before_pytorch_is_loaded(tmp_path: Path) -> None:
    home = {"HF_HOME": str(tmp_path / "hf")}
    for env in ({"HF_HUB_OFFLINE": "1"}, HUB_OFFLINE):
        fetching, line = refused_without_pytorch(tmp_path, "org/name", "out", env={**home, **env})
        assert fetching == "fetching org/name"
        assert line.startswith("error: org/name is not in the hub's cache and ")


def test_a_place_that_cannot_be_made_is_known_before_pytorch_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    [line] = refused_without_pytorch(tmp_path, TINY, tmp_path / "file" / "deep" / "out")
    assert line == (f"error: {tmp_path}/file/deep/out cannot be made: {tmp_path}/file is a file; give another folder")


def test_force_replaces_bundles_only(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    line = refusal("export", TINY, tmp_path, "--force")
    assert line == f"{tmp_path} is not a bundle; --force replaces bundles only, so choose another folder"
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_model_that_is_none(tmp_path: Path) -> None:
    assert "'nowhere' is no model: give" in refusal("export", "nowhere", tmp_path / "out")
    assert "starling-8b" in refusal("export", "random:starling-8b", tmp_path / "out")


def test_an_unknown_architecture(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "flying-spaghetti", "vocab_size": 8}))
    save_file({"weight": np.zeros((8, 8), np.float32)}, model / "model.safetensors")
    (model / "tokenizer.json").write_text("{}")
    assert "flying-spaghetti" in refusal("export", model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unreachable_hub(tmp_path: Path) -> None:
    line = refusal("export", "org/name", tmp_path / "out", code=1, env={**HUB_OFFLINE, "HF_HOME": str(tmp_path / "hf")})
    assert line == (
        "org/name is not in the hub's cache and http://127.0.0.1:9 cannot be reached: "
        "go online, or give a folder, a .gguf file or 'demo'"
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--dtype", "fp8"), "Invalid value for '--dtype'"),
        (("--dialect", "coreml"), "Invalid value for '--dialect'"),
        (("--quant", "int3"), "Invalid value for '--quant'"),
        (("--block-size", "64"), "--block-size is about quantized weights: add --quant int8 or int4"),
        (("--symmetric",), "--symmetric is about quantized weights"),
        (("--quant", "int4", "--block-size", "50"), "block size 50 is not one of 16, 32, 64, 128, 256"),
        (("--quant", "int4", "--accuracy-level", "9"), "accuracy level 9 is not between 0 and 4"),
        (("--bits", "4.5"), "--bits is about quantized weights"),
        (("--quant", "int8", "--bits", "6"), "6.0 bits a weight: give 4 to 8, for int4"),
        (("--quant", "int4", "--bits", "3"), "3.0 bits a weight: give 4 to 8, for int4"),
        (("--quant", "int4", "--bits", "5", "--dialect", "tensorrt"), "--bits is for --dialect ort"),
        (("--quant", "int8", "--dialect", "canonical"), "dialect canonical is full precision only"),
    ],
)
def test_impossible_settings(options: tuple[str, ...], expected: str, tmp_path: Path) -> None:
    assert expected in refusal("export", TINY, tmp_path / "out", *options)

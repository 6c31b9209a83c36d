"""`starling build` makes real plans with TensorRT for RTX, without a GPU: whole or not at all, weights once."""

import json
import re
import shutil
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import (
    copy_bundle,
    document,
    edit_manifest,
    end,
    install_hint,
    python_without,
    read_until,
    refusal,
    running,
    starling,
    succeed,
)

from starling.cli import build as build_command
from starling.engine.backends.tensorrt.build import optimization_profiles as profiles
from starling.engine.backends.tensorrt.build.builder import BuildOptions, build_engine
from starling.engine.backends.tensorrt.build.targets import check_precision, resolve_targets
from starling.engine.backends.tensorrt.build.timing_cache import cache_file, load_timing_cache, save_timing_cache
from starling.engine.backends.tensorrt.engine_folder import engine_names, open_engine
from starling.engine.backends.tensorrt.runtimes import RUNTIMES, load_library
from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import BuildError, UserError
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.exporter import ExportOptions, export_bundle

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "darwin", reason="NVIDIA has no TensorRT for macOS"),
]

LAYERS, WINDOW, POSITIONS = 2, 4096, 8192
KERNELS_BYTES = 16 * 2**20
BUILDING = b"Preparing graph"


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """starling-tiny for TensorRT, fp16; nothing is built in it."""
    folder = tmp_path_factory.mktemp("tensorrt") / "tiny"
    export_bundle(tiny_checkpoint, folder, ExportOptions(dialect="tensorrt", dtype="fp16", check=False))
    return folder


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A copy to build in."""
    return copy_bundle(exported, tmp_path / "bundle")


@pytest.mark.parametrize("target", ["sm89", "sm120"])
def test_a_plan_is_built_ahead_of_time(target: str, bundle: Path) -> None:
    finished = starling("build", bundle, "--target", target, "--max-batch", "4", "--max-prefill", "512", "--json")
    assert finished.returncode == 0, finished.stderr
    first = finished.stderr.splitlines()[0]
    assert first == "parsing model.onnx; the build takes about 0.5 GB of memory and 0.1 GB of disk"
    record, version = json.loads(finished.stdout), load_library("tensorrt-rtx").version
    name = f"tensorrt-rtx-{'.'.join(version.split('.')[:3])}-{target}"
    assert record["name"] == name
    assert record["file"] == str(bundle / "engines" / f"{name}.plan")
    assert record["runtime"] == {"name": "tensorrt-rtx", "version": version}
    assert record["targets"] == [target]
    assert record["precision"] == {"dtype": "fp16", "quantization": None}
    assert (record["max_batch"], record["max_prefill"], record["max_seq"]) == (4, 512, 2048)
    assert record["layers"]["KV_CACHE_UPDATE"] == 2 * LAYERS
    assert record["layers"]["ATTENTION_INPUT"] == LAYERS
    assert record["aliases"] == [
        [f"past_key_values.{layer}.{what}", f"present.{layer}.{what}"]
        for layer in range(LAYERS)
        for what in ("key", "value")
    ]
    _check_tensors(record)
    assert 0 <= record["plan"]["bytes"] - Bundle.open(bundle).weights.bytes < KERNELS_BYTES
    assert {file.name for file in (bundle / "engines").iterdir()} == {f"{name}.plan", f"{name}.json"}
    assert open_engine(Bundle.open(bundle), name, verify=True).to_json().items() <= record.items()


def test_a_greedy_plan_has_nothing_that_draws(bundle: Path) -> None:
    drawing, greedy = (
        document("build", bundle, "--target", "sm89", "--max-seq", "64", *more) for more in ((), ("--greedy",))
    )
    assert greedy["name"] == f"{drawing['name']}-greedy"
    inputs = [{tensor["name"] for tensor in record["inputs"]} for record in (drawing, greedy)]
    assert inputs[0] - inputs[1] == {"temperature", "top_k", "top_p", "noise"}
    assert greedy["outputs"] == drawing["outputs"]
    assert "TOPK" in drawing["layers"]
    assert "TOPK" not in greedy["layers"]
    assert sum(greedy["layers"].values()) < sum(drawing["layers"].values()) - 40
    assert greedy["layers"]["ATTENTION_INPUT"] == LAYERS


def _check_tensors(record: dict[str, Any]) -> None:
    inputs = {tensor["name"]: tensor for tensor in record["inputs"]}
    outputs = {tensor["name"]: tensor for tensor in record["outputs"]}
    cache = {"dtype": "float16", "shape": ["batch", 8, 2048, 128]}
    assert inputs["past_key_values.1.value"] == {"name": "past_key_values.1.value", **cache}
    assert outputs["present.1.value"] == {"name": "present.1.value", **cache}
    assert inputs["input_ids"] == {"name": "input_ids", "dtype": "int64", "shape": ["batch", "sequence"]}
    assert outputs["logits"] == {"name": "logits", "dtype": "float16", "shape": ["batch", 1, 32002]}
    prefill, decode = record["profiles"]
    assert (prefill["name"], decode["name"]) == ("prefill", "decode")
    assert prefill["shapes"]["input_ids"] == {"min": [1, 1], "opt": [1, 256], "max": [4, 512]}
    assert decode["shapes"]["input_ids"] == {"min": [1, 1], "opt": [4, 1], "max": [4, 1]}
    assert decode["shapes"]["past_key_values.0.key"]["max"] == [4, 8, 2048, 128]
    assert set(prefill["shapes"]) == set(inputs)


@pytest.mark.parametrize(
    ("scheme", "quantize", "dequantize"),
    [("w8a8", 4 * LAYERS, 8 * LAYERS), ("int8", 0, 4 * LAYERS)],  # packed QKV, output, packed gate and up, down
)
def test_quantized_plans(scheme: str, quantize: int, dequantize: int, tmp_path: Path) -> None:
    out = tmp_path / scheme
    calibrated = ("--calibration-tokens", "64", "--keep-precision", "none") if scheme == "w8a8" else ()
    model = ("random:starling-tiny", out, "--dialect", "tensorrt", "--dtype", "fp16", "--no-check")
    succeed("export", *model, "--quant", scheme, *calibrated)
    for target in ("sm89", "sm120"):
        record = document("build", out, "--target", target, "--max-seq", "256")
        assert record["precision"]["quantization"]["scheme"] == scheme
        layers = record["layers"]
        assert (layers.get("QUANTIZE", 0), layers["DEQUANTIZE"]) == (quantize, dequantize)
        assert (layers["ATTENTION_INPUT"], layers["KV_CACHE_UPDATE"]) == (LAYERS, 2 * LAYERS)
        assert 0 <= record["plan"]["bytes"] - Bundle.open(out).weights.bytes < KERNELS_BYTES


def test_one_plan_for_two_targets_in_bf16(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "bf16"
    export_bundle(tiny_checkpoint, out, ExportOptions(dialect="tensorrt", dtype="bf16", check=False))
    record = document("build", out, "--target", "sm89, sm120,sm89", "--max-seq", "256")
    assert record["targets"] == ["sm89", "sm120"]
    assert record["name"].endswith("-sm89-sm120")
    assert record["precision"]["dtype"] == "bf16"
    assert record["inputs"][-1]["dtype"] == "bfloat16"
    assert record["max_prefill"] == 256
    line = refusal("build", out, "--target", "sm75")
    assert line == "target sm75 has no bf16: the bundle's bf16 takes sm80 or newer"


def test_a_plan_for_one_row_stores_the_weights_once(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Bundle.open(bundle)
    once = build_engine(opened, BuildOptions(targets=("sm89",), max_seq=256, name="once"))
    assert once.profiles[1].shapes["past_lengths"].max == (2,)
    monkeypatch.setattr(profiles, "LEAST_MAX_BATCH", 1)
    twice = build_engine(opened, BuildOptions(targets=("sm89",), max_seq=256, name="twice"))
    assert once.plan.bytes < opened.weights.bytes + KERNELS_BYTES
    assert twice.plan.bytes > once.plan.bytes + opened.weights.bytes / 4


def test_the_window_is_in_the_plan_only_where_a_sequence_can_outgrow_it(bundle: Path) -> None:
    within = document("build", bundle, "--target", "sm89", "--max-seq", str(WINDOW), "--engine", "within")
    beyond = document("build", bundle, "--target", "sm89", "--max-seq", str(WINDOW + 1), "--engine", "beyond")
    assert within["layers"]["ELEMENTWISE"] < beyond["layers"]["ELEMENTWISE"]
    assert beyond["layers"]["ATTENTION_INPUT"] == within["layers"]["ATTENTION_INPUT"] == LAYERS


def test_inspect_shows_engines_without_tensorrt(bundle: Path, tmp_path: Path) -> None:
    summary = succeed("build", bundle, "--target", "sm89", "--max-seq", "256", "--engine", "mine")
    assert "bundle/engines/mine.plan: " in summary
    assert "2 attentions, 4 KV cache updates in place" in summary
    python = python_without(tmp_path / "venv", "tensorrt_rtx", "cuda")
    shown = starling("inspect", bundle, python=python)
    assert shown.returncode == 0, shown.stderr
    assert "engine     mine (5" in shown.stdout
    text = starling("inspect", bundle, "--engine", "mine", python=python).stdout
    for part in ("targets    sm89", "tokens 1..256", "4 of float16 [batch, 8, 256, 128]", "4 KV_CACHE_UPDATE"):
        assert part in text
    raw = json.loads((bundle / "engines" / "mine.json").read_text())
    assert raw.items() <= document("inspect", bundle, "--engine", "mine").items()
    assert [engine["name"] for engine in document("inspect", bundle)["engines"]] == ["mine"]
    line = refusal("inspect", bundle, "--engine", "yours")
    assert line == f"no engine 'yours': {bundle} has mine"
    (bundle / "engines" / "mine.plan").write_bytes(b"cut")
    assert "mine: not usable: " in succeed("inspect", bundle)
    assert "mine.plan is truncated: 3 bytes where its record says" in refusal("inspect", bundle, "--engine", "mine")


def test_without_tensorrt(bundle: Path, tmp_path: Path) -> None:
    python = python_without(tmp_path / "venv", "tensorrt_rtx")
    line = refusal("build", bundle, "--target", "sm89", code=1, python=python)
    assert line == (
        f"neither TensorRT for RTX nor TensorRT is installed: {install_hint('tensorrt-rtx')} (GeForce and RTX cards; "
        f"builds without a GPU) or {install_hint('tensorrt')} (datacenter cards)"
    )
    line = refusal("build", bundle, "--runtime", "tensorrt-rtx", code=1, python=python)
    assert line.startswith("TensorRT for RTX is not installed (No module named 'tensorrt_rtx'): pip install")
    assert "TensorRT for RTX is not installed" in starling("doctor", python=python).stdout
    assert not (bundle / "engines").exists()


def test_doctor_says_what_plans_can_be_built_for() -> None:
    findings = {entry["subject"]: entry for entry in document("doctor")["findings"]}
    assert findings["TensorRT for RTX"]["ok"]
    assert "builds plans ahead of time for sm75, sm86, sm89, sm120" in findings["TensorRT for RTX"]["text"]
    assert "TensorRT" in findings


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--target", "sm99"), r"target 'sm99': TensorRT for RTX [0-9.]+ builds for sm75, "),
        (("--target", "sm90"), "for sm90 (H100, H200) build on such a machine with --runtime tensorrt"),
        (("--target", "ada"), "target 'ada': TensorRT for RTX "),
        (("--max-seq", str(POSITIONS + 1)), f"--max-seq is {POSITIONS + 1}, but this model has {POSITIONS} positions"),
        (("--max-seq", "128", "--max-prefill", "129"), "--max-prefill is 129, but --max-seq is 128: give 1 to 128"),
        (("--max-batch", "0"), "Invalid value for '--max-batch'"),
        (("--engine", "../mine"), "engine name '../mine': use letters, digits and . _ + -"),
        (("--engine", ".hidden"), "engine name '.hidden': use letters"),
        (("--runtime", "onnxruntime"), "Invalid value for '--runtime'"),
    ],
)
def test_impossible_settings(options: tuple[str, ...], expected: str, bundle: Path) -> None:
    target = () if "--target" in options else ("--target", "sm89")
    line = refusal("build", bundle, *target, *options)
    assert expected in line or re.match(expected, line)
    assert not (bundle / "engines").exists()


def test_a_bundle_of_another_dialect(tiny_bundle: Path) -> None:
    line = refusal("build", tiny_bundle, "--target", "sm89")
    assert line == (
        f"{tiny_bundle} is a bundle of the dialect ort, which TensorRT would misread: "
        "starling export MODEL OUT --dialect tensorrt --dtype fp16"
    )


def test_a_canonical_graph_that_calls_itself_one_for_tensorrt(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_bundle(tiny_checkpoint, out, ExportOptions(dialect="canonical", dtype="fp16", check=False))
    edit_manifest(out, dialect="tensorrt")
    line = refusal("build", out, "--target", "sm89", code=1)
    assert line.startswith("the network would not mean what the model means: input nonpad_kv_seqlen is not used; ")
    assert line.endswith("export the model with --dialect tensorrt")
    assert not (out / "engines").exists()


def test_a_graph_that_lacks_layers(bundle: Path) -> None:
    architecture = json.loads((bundle / "bundle.json").read_text())["architecture"]
    edit_manifest(bundle, architecture=architecture | {"layers": 3})
    line = refusal("build", bundle, "--target", "sm89")
    assert "architecture.layers is '3', not that of the graph, which has 4 past inputs" in line


def test_an_engine_is_replaced_by_force_only(bundle: Path) -> None:
    first = document("build", bundle, "--target", "sm89", "--max-seq", "128", "--engine", "mine")
    line = refusal("build", bundle, "--target", "sm120", "--engine", "mine")
    assert (
        line == f"{bundle}/engines/mine.plan exists; give another name with --engine, or --force to replace the engine"
    )
    assert open_engine(Bundle.open(bundle), "mine").plan.sha256 == first["plan"]["sha256"]
    again = document("build", bundle, "--target", "sm120", "--max-seq", "256", "--engine", "mine", "--force")
    assert open_engine(Bundle.open(bundle), "mine").to_json().items() <= again.items()
    assert (again["targets"], again["max_seq"]) == (["sm120"], 256)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_build_leaves_nothing(number: signal.Signals, code: int, bundle: Path) -> None:
    with running("build", bundle, "--target", "sm89") as process:
        read_until(process.stderr, BUILDING)
        returned, out, errors = end(process, number)
    assert (returned, out) == (code, "")
    assert code != 130 or errors.strip().splitlines()[-1] == "error: interrupted"
    assert not (bundle / "engines").exists()


def test_a_killed_build_leaves_no_engine_and_the_next_one_works(bundle: Path) -> None:
    with running("build", bundle, "--target", "sm89", "--engine", "mine") as process:
        read_until(process.stderr, BUILDING)
        end(process, signal.SIGKILL)
    assert [file.name for file in (bundle / "engines").iterdir()] == [".mine.plan.partial"]
    assert engine_names(bundle) == ()
    assert document("inspect", bundle)["engines"] == []
    succeed("build", bundle, "--target", "sm89", "--engine", "mine")
    assert engine_names(bundle) == ("mine",)
    assert {file.name for file in (bundle / "engines").iterdir()} == {"mine.plan", "mine.json"}


def test_two_builds_of_one_engine_at_once(bundle: Path) -> None:
    with running("build", bundle, "--target", "sm89", "--engine", "mine") as process:
        read_until(process.stderr, b"parsing")
        process.send_signal(signal.SIGSTOP)
        line = refusal("build", bundle, "--target", "sm120", "--engine", "mine", code=1)
        other = document("build", bundle, "--target", "sm120", "--max-seq", "128", "--engine", "other")
        process.send_signal(signal.SIGCONT)
        assert process.wait(60) == 0
    assert line == ("engine mine is being built by another process: wait for it, or give another name with --engine")
    assert open_engine(Bundle.open(bundle), "mine", verify=True).targets == ("sm89",)
    assert other["targets"] == ["sm120"]


def test_a_disk_too_small_for_the_plan(exported: Path, small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("size=80m")
    line = refusal("build", _real_copy(exported, disk / "bundle"), "--target", "sm89", code=1)
    assert line.startswith(f"not enough disk space in {disk}/bundle/engines: the plan needs about 0.11 GB, 0.0")
    assert not (disk / "bundle" / "engines").exists()


def test_a_disk_that_is_full_while_writing(exported: Path, small_disk: Callable[[str], Path]) -> None:
    entries = len(list(exported.rglob("*"))) + 2  # the bundle's folder and the disk's own
    disk = small_disk(f"size=400m,nr_inodes={entries + 1}")  # room for the folder of engines, none for a file in it
    line = refusal("build", _real_copy(exported, disk / "bundle"), "--target", "sm89", code=1)
    assert line == f"the disk of {disk}/bundle/engines is full: the plan was not written; free space and retry"
    assert not (disk / "bundle" / "engines").exists()


def test_a_bundle_that_may_not_be_written(bundle: Path) -> None:
    (bundle / "engines").write_text("in the way")
    line = refusal("build", bundle, "--target", "sm89", code=1)
    assert line == f"cannot write an engine to {bundle}/engines: File exists"


def test_a_datacenter_build_is_for_the_gpu_that_is_present(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match="TensorRT 11 builds for the GPU that is present, and nvidia-smi shows none"):
        resolve_targets("TensorRT 11", None, ())
    with pytest.raises(UserError, match="there is no GPU here: say what to build for, --target with one or more of"):
        resolve_targets("TensorRT for RTX 1.7", ("sm89",), ())
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 9.0\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    assert resolve_targets("TensorRT 11", None, ()) == resolve_targets("TensorRT 11", None, ("sm90",)) == ("sm90",)
    with pytest.raises(UserError, match=r"for the GPU that is present \(sm90\), not for sm89: leave --target out"):
        resolve_targets("TensorRT 11", None, ("sm89",))
    with pytest.raises(UserError, match="the GPU here is sm90: say what to build for"):
        resolve_targets("TensorRT for RTX 1.7", ("sm89",), ())


def test_fp8_takes_a_target_that_has_it() -> None:
    check_precision(("sm89", "sm120"), "fp16", "fp8")
    with pytest.raises(UserError, match="target sm86 has no fp8: the bundle's fp8 takes sm89 or newer"):
        check_precision(("sm89", "sm86"), "fp16", "fp8")


@pytest.mark.filterwarnings("ignore:Use Deprecated:DeprecationWarning")  # RTX's own does nothing, but has a file
def test_the_timing_cache_is_kept_and_a_damaged_one_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = load_library("tensorrt-rtx")
    config = library.module.Builder(library.logger).create_builder_config()
    file = cache_file(library, ("sm89",))
    assert file == tmp_path / "starling" / "timing" / f"tensorrt-rtx-{library.version}-sm89.cache"
    assert load_timing_cache(config, file) is None
    assert save_timing_cache(config, file) is None
    kept = file.read_bytes()
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert load_timing_cache(config, file) is None
    file.write_bytes(kept[:-1])
    assert load_timing_cache(config, file) == f"{file} is damaged: timing again"
    assert save_timing_cache(config, file) is None
    assert file.read_bytes() == kept
    file.unlink()
    file.parent.rmdir()
    file.parent.write_text("in the way")
    assert "timings are not kept: " in (save_timing_cache(config, file) or "")


def test_choices_are_those_of_the_library() -> None:
    assert build_command.RUNTIMES == RUNTIMES


def _real_copy(bundle: Path, to: Path) -> Path:
    return Path(shutil.copytree(bundle, to))

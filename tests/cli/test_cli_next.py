"""What a command names as the next one is the right one for what was made, and can be pasted into a shell."""

import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import copy_bundle, edit_manifest, starling, succeed

from starling.cli.shared.next_commands import EXAMPLE_PROMPT, EXAMPLE_TARGET, after_export, quoted
from starling.engine.backends.tensorrt.build.targets import check_precision, present_target
from starling.engine.bundle.manifest import Bundle
from starling.engine.names import DTYPES, SCHEMES

pytestmark = pytest.mark.slow

TINY = "random:starling-tiny"


def export(out: Path, *options: str) -> str:
    """The last line of an export."""
    return succeed("export", TINY, out, "--no-check", *options).splitlines()[-1]


def words_of(line: str) -> list[str]:
    """The words of the command in a line `next…: COMMAND`, as a shell takes them apart."""
    words = shlex.split(line.partition(": ")[2])
    assert words[0] == "starling"
    return words[1:]


def test_after_an_export_for_onnxruntime_comes_generate(tmp_path: Path) -> None:
    out = tmp_path / "my bundles" / "it's tiny"
    line = export(out, "--quant", "int4")
    assert line.startswith("next: starling generate ")
    assert words_of(line) == ["generate", str(out), EXAMPLE_PROMPT]
    succeed(*words_of(line), "--max-tokens", "2")


@pytest.mark.skipif(sys.platform == "darwin", reason="NVIDIA has no TensorRT for macOS")
def test_after_an_export_for_tensorrt_comes_build_and_then_the_engine(tmp_path: Path) -> None:
    out = tmp_path / "for tensorrt"
    line = export(out, "--dialect", "tensorrt", "--dtype", "fp16")
    target = [] if present_target() else ["--target", EXAMPLE_TARGET]
    assert words_of(line) == ["build", str(out), "--runtime", "tensorrt-rtx", *target]
    built = succeed(*words_of(line), "--max-seq", "64", "--max-prefill", "32", "--engine", "small").splitlines()[-1]
    if not present_target():
        assert built.startswith(f"next, on a GPU of {EXAMPLE_TARGET}: starling generate ")
    chosen = ["--backend", "tensorrt-rtx", "--engine", "small", "--max-seq", "64"]
    assert words_of(built) == ["generate", str(out), EXAMPLE_PROMPT, *chosen]
    if not present_target():  # there it would run
        finished = starling(*words_of(built))
        assert finished.returncode == 1
        assert "GPU" in finished.stderr or "CUDA" in finished.stderr
    assert "engines" in succeed("inspect", out, "--engine", "small")


def test_after_the_canonical_dialect_comes_evaluate(tmp_path: Path) -> None:
    line = export(tmp_path / "canonical", "--dialect", "canonical")
    assert words_of(line) == ["evaluate", str(tmp_path / "canonical")]
    assert "perplexity" in succeed(*words_of(line), "--window", "24", "--text-tokens", "24")


def test_what_no_cpu_runs_is_not_named_for_one(tiny_bundle: Path, tmp_path: Path) -> None:
    copied = copy_bundle(tiny_bundle, tmp_path / "bf16")
    edit_manifest(copied, dtype="bf16", kernel_graph=None)
    bundle = Bundle.open(copied)
    line = after_export(bundle)
    assert line.startswith("next, on a machine with CUDA: starling generate ")
    assert words_of(line)[-2:] == ["--backend", "onnxruntime-cuda"]
    with_kernels = replace(bundle, kernel_graph="model_kernels.onnx")
    assert words_of(after_export(with_kernels)) == ["generate", str(copied), EXAMPLE_PROMPT]
    assert after_export(replace(bundle, dialect="canonical")) == f"next: starling inspect {copied}"


def test_a_bundle_is_named_where_no_option_can_be_meant() -> None:
    assert quoted("plain/path") == "plain/path"
    assert quoted("-out") == "./-out"
    assert shlex.split(quoted("a b;c$d'e")) == ["a b;c$d'e"]


def test_a_repository_with_a_space_can_be_started(tiny_bundle: Path, tmp_path: Path) -> None:
    line = succeed("triton", tiny_bundle, tmp_path / "a repo").splitlines()[-1]
    assert str(tmp_path / "a repo" / "start.sh") in shlex.split(line)
    assert str(tmp_path / "a repo" / "make_environment.sh") in shlex.split(line)


def test_the_target_of_the_example_has_every_type() -> None:
    for dtype in DTYPES:
        for scheme in (None, *SCHEMES):
            check_precision((EXAMPLE_TARGET,), dtype, scheme)

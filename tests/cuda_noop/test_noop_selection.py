"""Which backend `auto` takes where onnxruntime-gpu is installed, with a GPU (one that does nothing) and without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from noop_cuda import BUNDLES, opened

from starling.engine.backends.onnxruntime.onnxruntime_cuda import KERNELS_SWITCH

ROOT = Path(__file__).parents[2]
GENERATE = ("--raw", "hello", "--max-tokens", "2", "--json")


def starling(*words: str | Path, gpu: bool) -> subprocess.CompletedProcess[str]:
    """A command line, where CUDA's libraries are to be found or not."""
    env = {name: value for name, value in os.environ.items() if gpu or name != "LD_LIBRARY_PATH"}
    command = [sys.executable, "-m", "starling", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_without_a_gpu_auto_takes_the_cpu_says_why_and_its_json_is_clean() -> None:
    done = starling("generate", BUNDLES / "tiny-fp16", *GENERATE, gpu=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["provider"] == "CPUExecutionProvider"
    assert len(answer["results"][0]["tokens"]) == 2
    assert "the CPU runs the bundle, since CUDA cannot run here" in done.stderr


def test_with_a_gpu_auto_takes_it_and_its_json_is_clean() -> None:
    done = starling("generate", BUNDLES / "tiny-fp16", *GENERATE, gpu=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["provider"] == "CUDAExecutionProvider"
    assert len(answer["results"][0]["tokens"]) == 2
    assert "CPU" not in done.stderr


def test_an_fp32_bundle_says_why_it_runs_on_the_cpu() -> None:
    with opened("tiny-fp32", backend="auto") as backend:
        assert backend.provider == "CPUExecutionProvider"
        assert backend.note is not None
        assert "the CPU runs the bundle, since CUDA cannot run here" in backend.note
        assert "--dtype fp16" in backend.note


def test_our_kernels_are_taken_on_cards_that_have_shown_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KERNELS_SWITCH, raising=False)
    for target, kernels in (("90", "sm90"), ("80", None)):
        monkeypatch.setenv("NOOP_CUDA_TARGET", target)
        with opened("tiny-int8-fp16", backend="auto") as backend:
            assert backend.kernels == kernels

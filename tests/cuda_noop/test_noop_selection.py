"""Which backend `auto` takes where onnxruntime-gpu is installed, with a GPU (one that does nothing) and without one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from noop_cuda import BUNDLES, opened

from starling.engine.backends.onnxruntime.cuda_session import KERNELS_SWITCH

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


def test_a_provider_that_does_not_start_is_seen_before_the_model_is_read(tmp_path: Path) -> None:
    """The libraries are there but cuRAND, as after half an installation; the model would not fit into memory."""
    for library in Path(os.environ["LD_LIBRARY_PATH"]).iterdir():
        if "curand" not in library.name:
            shutil.copy(library, tmp_path)
    code = (
        "import sys\n"
        "from starling.engine.backends.open_backend import open_backend\n"
        "from starling.engine.bundle.manifest import Bundle\n"
        "from starling.profiling.machine.describe import peak_rss_bytes\n"
        "try:\n"
        "    open_backend(Bundle.open(sys.argv[1]), name='onnxruntime-cuda', max_seq=64)\n"
        "except Exception as error:\n"
        "    print(error)\n"
        "print(peak_rss_bytes() // 1024)\n"
    )
    env = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    command = [sys.executable, "-c", code, str(BUNDLES / "7b-fp16")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    message, kibibytes = done.stdout.splitlines()
    assert "CUDAExecutionProvider did not start" in message
    assert int(kibibytes) < 1_000_000


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

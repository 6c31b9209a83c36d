"""lm-eval gives a bundle the scores that it gives transformers on the same weights, in process and through a server.

In an environment of its own beside this one, which it takes minutes to make: `make test-lm-eval` runs it.
"""

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from http_server import Server, serving

from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.exporter import ExportOptions, export_bundle
from starling.profiling.peers.checkpoint_folder import GGUF, write_checkpoint

pytestmark = [pytest.mark.lm_eval, pytest.mark.slow]
TASKS = Path(__file__).parents[1] / "data" / "lm_eval"
LM_EVAL = "lm_eval==0.4.13"
LENGTH = 256
CHOICE, ANSWER, TEXT = "starling_choice", "starling_answer", "starling_text"
Samples = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has lm-eval and, after its own packages, those of this environment."""
    folder = tmp_path_factory.mktemp("lm-eval")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    (Path(own.stdout.strip()) / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", LM_EVAL], check=True)
    return python


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as transformers reads it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "smollm2"
    write_checkpoint("demo", folder)
    (folder / GGUF).unlink()
    return folder


@pytest.fixture(scope="session")
def by_transformers(python: Path, checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """What lm-eval finds by PyTorch."""
    model = f"pretrained={checkpoint_folder},dtype=float32,max_length={LENGTH}"
    return run(python, tmp_path_factory.mktemp("hf"), "--model", "hf", "--model_args", model, "--device", "cpu")


@pytest.fixture(scope="session")
def server(demo_bundle: Path) -> Iterator[Server]:
    """The bundle served as it would be, with tokens for lm-eval's own ones beside the longest prompt."""
    with serving(demo_bundle, "--max-batch", "4", "--max-seq", str(2 * LENGTH)) as running:
        yield running


def run(python: Path, out: Path, *arguments: str, tasks: Sequence[str] = (CHOICE, ANSWER, TEXT)) -> Samples:
    """The samples of each task, in order, as the command line writes them."""
    command = [python, "-m", "starling.profiling.quality.lm_eval_model", "run", *arguments]
    command += ["--tasks", ",".join(tasks), "--include_path", str(TASKS)]
    command += ["--num_fewshot", "2", "--batch_size", "4", "--log_samples", "--output_path", str(out)]
    local = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(out / "datasets"), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=TASKS, env=os.environ | local, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: Samples = {}
    for file in out.glob("*/samples_*.jsonl"):
        task = file.name.removeprefix("samples_").rsplit("_", 1)[0]
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        found[task] = sorted(lines, key=lambda line: line["doc_id"])
    return found


def check_choices(got: Samples, expected: Samples) -> None:
    """The same choices, as near as float32 has the log-probabilities of all answers."""
    assert len(expected[CHOICE]) == 22
    for ours, theirs in zip(got[CHOICE], expected[CHOICE], strict=True):
        assert (ours["acc"], ours["acc_norm"]) == (theirs["acc"], theirs["acc_norm"])
        answers, wanted = ours["filtered_resps"], theirs["filtered_resps"]
        assert [is_greedy for _, is_greedy in answers] == [is_greedy for _, is_greedy in wanted]
        values = [[float(value) for value, _ in each] for each in (answers, wanted)]
        assert values[0] == pytest.approx(values[1], abs=1e-3)
        assert values[0].index(max(values[0])) == values[1].index(max(values[1]))
    assert 0 < sum(line["acc"] for line in expected[CHOICE]) < 22, "else nothing is compared"


def check_texts(got: Samples, expected: Samples) -> None:
    """The log-likelihood of whole texts."""
    assert len(expected[TEXT]) == 5
    for ours, theirs in zip(got[TEXT], expected[TEXT], strict=True):
        assert ours["byte_perplexity"] == pytest.approx(theirs["byte_perplexity"], rel=1e-4)


def check_same(got: Samples, expected: Samples) -> None:
    """The same choices, texts and scores."""
    check_choices(got, expected)
    check_texts(got, expected)
    assert len(expected[ANSWER]) == 10
    for ours, theirs in zip(got[ANSWER], expected[ANSWER], strict=True):
        assert (ours["resps"], ours["exact_match"]) == (theirs["resps"], theirs["exact_match"])
    assert 0 < sum(line["exact_match"] for line in expected[ANSWER]) < 10


def test_in_process_all_is_as_by_transformers(
    python: Path, demo_bundle: Path, by_transformers: Samples, tmp_path: Path
) -> None:
    model = f"pretrained={demo_bundle},max_length={LENGTH},threads=2"
    check_same(run(python, tmp_path, "--model", "starling", "--model_args", model), by_transformers)


def test_through_a_server_all_is_as_by_transformers(
    python: Path, server: Server, by_transformers: Samples, tmp_path: Path
) -> None:
    """lm-eval leaves a token to the answer and one to the context: so that its windows are those of the others."""
    url = f"http://127.0.0.1:{server.port}/v1/completions"
    model = f"model=m,base_url={url},tokenizer_backend=remote,max_length={LENGTH + 2}"
    check_same(run(python, tmp_path, "--model", "local-completions", "--model_args", model), by_transformers)


def test_lm_evals_own_onnx_runtime_runs_a_bundle_with_all_logits(
    python: Path, demo_checkpoint: Checkpoint, by_transformers: Samples, tmp_path: Path
) -> None:
    """It cuts a window and its first token to `max_length` tokens."""
    export_bundle(demo_checkpoint, tmp_path / "bundle", ExportOptions(check=False, all_logits=True))
    model = f"pretrained={tmp_path / 'bundle'},max_length={LENGTH + 1}"
    arguments = ("--model", "onnxruntime", "--model_args", model)
    check_choices(run(python, tmp_path / "out", *arguments, tasks=(CHOICE,)), by_transformers)


def test_settings_that_the_engine_does_not_have_are_refused_by_name(
    python: Path, demo_bundle: Path, tmp_path: Path
) -> None:
    program = f"""
from lm_eval.api.instance import Instance
from starling.engine.errors import UserError
from starling.profiling.quality.lm_eval_model import StarlingLM

model = StarlingLM({str(demo_bundle)!r}, max_length=64, batch_size="auto", max_batch_size=2)
asked = [("Once upon a time", {{"until": ["."], "max_gen_toks": 4}}), ("The", {{"num_beams": 4}})]
requests = [Instance("generate_until", {{}}, args, 0) for args in asked]
assert model.generate_until(requests[:1], disable_tqdm=True)[0].strip()
try:
    model.generate_until(requests[1:])
except UserError as error:
    print(error)
"""
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "gen_kwargs has num_beams, which starling does not have: leave it out" in done.stdout

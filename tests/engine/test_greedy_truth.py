"""The real model, end to end: our greedy text is PyTorch's own, and onnxruntime-genai's from the same bundle."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from starling.engine.bundle.manifest import Bundle
from starling.engine.engine import Engine
from starling.export.check.torch_reference import load_reference
from starling.export.checkpoints.checkpoint import Checkpoint

NEW_TOKENS = 64
QUESTIONS = [
    "What is the capital of France?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Explain in two sentences why the sky is blue.",
    "List 5 fruits that are red.",
    "Translate to French: The weather is nice today, 23 degrees.",
    "A train leaves at 14:05 and arrives at 16:50. How long does it take?",
]
GENAI = "onnxruntime-genai==0.18.0"
GENAI_PROGRAM = """
import json, sys
import onnxruntime_genai as og
model = og.Model(sys.argv[1])
results = []
for ids in json.loads(sys.argv[2]):
    params = og.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=len(ids) + 64)
    generator = og.Generator(model, params)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    results.append([int(i) for i in generator.get_sequence(0)][len(ids):])
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def prompts(demo_bundle: Path) -> list[list[int]]:
    with Engine(demo_bundle, max_seq=256) as engine:
        return [engine.apply_chat_template([{"role": "user", "content": q}]) for q in QUESTIONS]


@pytest.fixture(scope="module")
def ours(demo_bundle: Path, prompts: list[list[int]]) -> list[list[int]]:
    with Engine(demo_bundle, max_seq=256) as engine:
        return [list(engine.generate(p, max_tokens=NEW_TOKENS, ignore_eos=True).tokens) for p in prompts]


def test_greedy_tokens_are_pytorchs(
    demo_checkpoint: Checkpoint, prompts: list[list[int]], ours: list[list[int]]
) -> None:
    model = load_reference(demo_checkpoint.config, demo_checkpoint.tensors)
    for question, prompt, tokens in zip(QUESTIONS, prompts, ours, strict=True):
        assert len(tokens) == NEW_TOKENS
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
        assert logits.argmax(-1).tolist() == tokens, question


def test_the_answer_is_sensible(demo_bundle: Path) -> None:
    with Engine(demo_bundle, max_seq=256) as engine:
        assert "Paris" in engine.chat().send("What is the capital of France?").text


@pytest.fixture(scope="session")
def genai_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """onnxruntime-genai in a folder of its own: it is not a dependency."""
    folder = tmp_path_factory.mktemp("genai")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), GENAI]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        pytest.skip(f"{GENAI} could not be installed: {done.stderr.strip().splitlines()[-1]}")
    return folder


def test_unmodified_onnxruntime_genai_runs_the_bundle(
    genai_path: Path, demo_bundle: Path, prompts: list[list[int]], ours: list[list[int]]
) -> None:
    assert importlib.metadata.version("onnxruntime")  # the one runtime that both use
    done = subprocess.run(
        [sys.executable, "-c", GENAI_PROGRAM, str(demo_bundle), json.dumps(prompts)],
        env=os.environ | {"PYTHONPATH": str(genai_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    eos = Bundle.open(demo_bundle).tokens.eos
    for tokens, theirs in zip(ours, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert theirs == tokens[: len(theirs)]
        # it ends at the end token, and does not show it
        assert len(theirs) == NEW_TOKENS or tokens[len(theirs)] in eos

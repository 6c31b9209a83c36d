"""`starling verify` of bundles that score or embed: right here, and wrong with other weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import copy_bundle, refusal, replace_recorded, starling, succeed
from tiny_scorers import reward_module, save_reward_module

from starling.engine.bundle.manifest import Bundle
from starling.engine.pooling.pooled_verification import NUMBERS_FILE, compared_texts
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.checkpoints.model_source import open_checkpoint
from starling.export.checkpoints.scoring_models import for_task
from starling.export.exporter import ExportOptions, export_bundle
from starling.export.quantization.blocks import BlockQuantization

WEIGHTS = "model.onnx.data"


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model with int8 weights, compared with PyTorch."""
    folder = tmp_path_factory.mktemp("verified")
    checkpoint = open_checkpoint(str(save_reward_module(reward_module(512), tiny_checkpoint, folder / "model")))
    export_bundle(checkpoint, folder / "bundle", ExportOptions(quantization=BlockQuantization("int8"), check=True))
    return folder / "bundle"


def test_the_kept_numbers_are_pytorchs(bundle: Path) -> None:
    kept = Bundle.open(bundle).verification
    assert kept is not None
    found = np.load(bundle / kept.file)
    with torch.inference_mode():
        module = reward_module(512)
        expected = [float(module(torch.tensor([text]))[0, 0]) for text in compared_texts(kept.tokens)]
    assert found[:, 0].tolist() == pytest.approx(expected, abs=1e-4)
    assert [len(text) for text in compared_texts(kept.tokens)] == [1, 48, 16, 14, 16]


def test_verify_says_right_in_a_line_and_as_json(bundle: Path) -> None:
    lines = succeed("verify", bundle, "--max-batch", "3").splitlines()
    assert lines[-1].split() == ["verdict", "right"]
    document = json.loads(succeed("verify", bundle, "--max-batch", "3", "--json"))
    assert document["right"] is True
    assert [(run["rows"], run["texts"], run["problem"]) for run in document["runs"]] == [(1, 5, None), (3, 5, None)]
    for run in document["runs"]:
        assert 0 < run["max_abs_diff"] <= run["limit"]
        assert run["max_abs_diff"] == pytest.approx(run["export_max_abs_diff"], rel=0.2)


def test_a_mean_of_hidden_states_is_verified(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    export_bundle(for_task(tiny_checkpoint, "embed", "mean"), tmp_path / "bundle", ExportOptions(check=True))
    document = json.loads(succeed("verify", tmp_path / "bundle", "--json"))
    assert document["right"] is True
    assert max(run["max_abs_diff"] for run in document["runs"]) < 1e-4


def test_other_weights_are_wrong(bundle: Path, tmp_path: Path) -> None:
    copy = copy_bundle(bundle, tmp_path / "b")
    weights = np.fromfile(copy / WEIGHTS, np.uint8)
    weights[: len(weights) // 8] ^= 0x10
    replace_recorded(copy, WEIGHTS, weights.tobytes())
    shown = starling("verify", copy)
    assert shown.returncode == 1
    assert "WRONG" in shown.stdout


def test_a_reference_that_is_missing_or_broken_is_one_line(bundle: Path, reward_bundle: Path, tmp_path: Path) -> None:
    assert "keeps nothing of PyTorch to compare with: export it again with --check" in refusal("verify", reward_bundle)
    copy = copy_bundle(bundle, tmp_path / "b")
    np.save(tmp_path / "other.npy", np.zeros((4, 1), np.float32))
    replace_recorded(copy, NUMBERS_FILE, (tmp_path / "other.npy").read_bytes())
    assert "has float32 [4, 1], not float32 [5, 1]: export it again" in refusal("verify", copy)
    replace_recorded(copy, NUMBERS_FILE, b"no array")
    assert f"{NUMBERS_FILE} holds no numbers" in refusal("verify", copy)
    assert "does not run bundles that score or embed" in refusal(
        "verify", bundle, "--backend", "onnxruntime-cuda", code=1
    )

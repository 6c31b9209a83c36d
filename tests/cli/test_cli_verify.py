"""`starling verify` on the real model: its verdict, its exit status, and weights that are not the export's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import copy_bundle, replace_file, replace_recorded, starling

WEIGHTS = "model.onnx.data"


def test_verify_says_right_in_a_line_and_as_json(demo_int8_bundle: Path) -> None:
    shown = starling("verify", demo_int8_bundle, "--max-batch", "2")
    assert shown.returncode == 0
    assert shown.stdout.splitlines()[-1].split() == ["verdict", "right"]
    document = json.loads(starling("verify", demo_int8_bundle, "--max-batch", "2", "--json").stdout)
    assert document["right"] is True
    assert [(run["rows"], run["problem"]) for run in document["runs"]] == [(1, None), (2, None)]
    assert 0 < document["runs"][0]["mean_kl"] < 0.01


def test_verify_ends_with_1_where_the_weights_are_others(demo_int8_bundle: Path, tmp_path: Path) -> None:
    bundle = copy_bundle(demo_int8_bundle, tmp_path / "b")
    weights = np.fromfile(bundle / WEIGHTS, np.uint8)
    weights[: len(weights) // 8] ^= 0x10  # of the bytes of int8 weights, a value's bit of weight 16
    replace_recorded(bundle, WEIGHTS, weights.tobytes())
    shown = starling("verify", bundle)
    assert shown.returncode == 1
    assert "WRONG" in shown.stdout
    assert json.loads(starling("verify", bundle, "--json").stdout)["right"] is False


@pytest.mark.slow
def test_verify_hashes_the_weights(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = copy_bundle(tiny_bundle, tmp_path / "b")
    content = bytearray((bundle / WEIGHTS).read_bytes())
    content[-1] ^= 1
    replace_file(bundle / WEIGHTS, bytes(content))
    shown = starling("verify", bundle)
    assert shown.returncode == 2
    assert "is altered" in shown.stderr

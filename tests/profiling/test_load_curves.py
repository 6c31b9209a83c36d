"""The programs that measure pace and drafts: real runs on a small model; what they say of time is not judged here."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from starling.engine import Engine
from starling.profiling.load import pace_curve, synthetic_acceptance


def test_the_pace_curve_has_a_point_for_each_slowdown_and_number_of_streams(tiny_bundle: Path, tmp_path: Path) -> None:
    arguments = ["--streams", "3", "--long-prompt", "64", "--slowdown", "1.5", "--slowdown", "3", "--rounds", "1"]
    out = tmp_path / "curve.json"
    result = CliRunner().invoke(
        pace_curve.command, [str(tiny_bundle), *arguments, "--threads", "1", "--output", str(out)]
    )
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text())
    points = document["points"]
    assert [(point["streams"], point["slowdown"]) for point in points] == [(1, 1.5), (1, 3.0), (2, 1.5), (2, 3.0)]
    assert all(point["p95_ratio"] > 0 and point["ttft_ms"] > 0 for point in points)
    assert result.output.count("TTFT") == 4


@pytest.mark.parametrize("streams", [1, 3])
def test_synthetic_drafts_are_right_as_often_as_asked_and_change_no_token(tiny_bundle: Path, streams: int) -> None:
    with Engine(tiny_bundle, backend="onnxruntime-cpu", max_batch=3, max_seq=256, threads=1) as engine:
        if streams > engine.backend.verified_rows:
            pytest.skip("ONNX Runtime's own attention verifies one row")
        gains = synthetic_acceptance.measure(engine, streams, (0.0, 0.6, 1.0), length=3, cost=0.1, tokens=60, rounds=1)
    assert all(gain.same_tokens for gain in gains)
    never, often, always = gains
    assert never.accepted_share == 0
    # After a wrong token of a draft the rest of it counts as refused.
    assert 0.25 < often.accepted_share < 0.75
    assert always.accepted_share == 1
    assert always.gain == pytest.approx(always.tokens_per_second_with / always.tokens_per_second_without)

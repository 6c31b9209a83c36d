"""The CPU operators answer or refuse whatever a graph asks of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from starling.engine.kernels import kernel_library

CASES = 400


@pytest.mark.skipif(kernel_library() is None, reason="the CPU kernels are not built on this machine")
def test_hostile_calls_end_in_an_answer_or_a_refusal(rounds: int) -> None:
    script = Path(__file__).with_name("operator_cases.py")
    command = [sys.executable, str(script), str(CASES * rounds), "1"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, f"the process ended with {finished.returncode}: {finished.stderr[-500:]}"
    answers = json.loads(finished.stdout)["answers"]
    print(answers)
    assert sum(answers.values()) >= CASES * rounds
    assert answers["seqlens_k lies outside the cache"] >= 20
    assert answers["an answer of GroupQueryAttention"] >= 20 * rounds
    assert answers["an answer of QuantizedLinear"] >= 20 * rounds

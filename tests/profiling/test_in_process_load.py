"""The load tool in this process counts only what was answered."""

from pathlib import Path

import pytest

from starling.engine.engine import Engine
from starling.engine.errors import ClosedError, PromptError, RequestFailed, StarlingError
from starling.engine.serving_loop import ServingLoop
from starling.profiling.load.in_process import measure_interference, measure_load


def test_every_prompt_is_answered_once(tiny_bundle: Path) -> None:
    with Engine(tiny_bundle, max_seq=64, max_batch=2, threads=1) as engine, ServingLoop(engine) as loop:
        load = measure_load(loop, [[1, 2, 3]] * 5, new_tokens=4, streams=2)
        assert loop.stats().generated_tokens == 20
    assert load.streams == 2
    assert load.tokens_per_second > 0


def test_a_request_that_fails_fails_the_measurement(tiny_bundle: Path) -> None:
    with Engine(tiny_bundle, max_seq=64, max_batch=2, threads=1) as engine:
        with ServingLoop(engine) as loop, pytest.raises(PromptError):
            measure_load(loop, [[1, 2], [1] * 100, [1, 2]], new_tokens=4, streams=2)
        with pytest.raises(ClosedError):
            measure_load(loop, [[1, 2]], new_tokens=4, streams=1)


def test_a_stream_that_ends_early_fails_the_measurement(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise ValueError("broken on purpose")

    with Engine(tiny_bundle, max_seq=64, max_batch=2, threads=1) as engine, ServingLoop(engine) as loop:
        with pytest.raises(StarlingError, match=r"ended \(length\) after 61 tokens, before 999"):
            measure_interference(loop, [[1, 2, 3]], [1] * 8, quiet_tokens=999, alone_ms=1)
        monkeypatch.setattr(engine.backend, "decode", fails)
        with pytest.raises(RequestFailed, match="broken on purpose"):
            measure_interference(loop, [[1, 2, 3]], [1] * 8, quiet_tokens=4, alone_ms=1)

"""The time of every layer on the TensorRT backend, on stand-ins for GPU and plan, and `profile --operators` from it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpu_plan import CHUNK, POSITIONS, ROWS, VERSION, Opened, cpu_engine, cpu_library, opened, stand_in, tensorrt_rtx
from host_device import HostDevice

from starling.engine.backends.tensorrt.run.layer_times import LayerTimes
from starling.engine.backends.tensorrt.run.tensorrt_backend import TensorRTBackend
from starling.engine.backends.tensorrt.runtimes import load_library
from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import BackendError
from starling.profiling.latency.sweep import Options, measure
from starling.profiling.latency.sweep_settings import Sweep
from starling.profiling.operators.layer_parts import PARTS
from starling.profiling.reports.profile_document import profile_document

PROMPT = np.arange(900, 900 + CHUNK + 3)


@pytest.fixture(scope="module")
def bundle(tiny_tensorrt_bundle: Path) -> Bundle:
    return Bundle.open(tiny_tensorrt_bundle)


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def timed(bundle: Bundle) -> Iterator[Opened]:
    """A backend that was opened to time its layers."""
    gpu = opened(bundle, time_layers=True)
    yield gpu
    gpu.backend.close()
    assert gpu.device.live == 0


def test_every_run_says_what_each_of_its_layers_took(timed: Opened) -> None:
    assert timed.backend.take_layer_times() == [], "what ran while the backend opened is nobody's"
    timed.backend.prefill(0, PROMPT, 0)
    timed.backend.decode([5, 6], [3, 4])
    first, second, decode = timed.backend.take_layer_times()
    layers = list(timed.engine.layers)
    assert [layer for layer, _ in first.layers] == [layer for layer, _ in second.layers] == layers
    assert [layer for layer, _ in decode.layers] == [f"{layer} [profile 1]" for layer in layers]
    for run in (first, second, decode):
        assert 0 < sum(ms for _, ms in run.layers) <= run.ms
    assert timed.backend.take_layer_times() == []


def test_steps_that_are_launched_ahead_are_timed_one_by_one(timed: Opened) -> None:
    timed.backend.prefill(0, PROMPT[:CHUNK], 0)
    for _ in range(2):
        timed.backend.launch(1)
    timed.backend.drop()
    runs = timed.backend.take_layer_times()
    assert [len(run.layers) for run in runs] == [len(timed.engine.layers)] * 3


def test_timed_steps_are_no_graphs_and_choose_the_same_tokens(bundle: Bundle, timed: Opened) -> None:
    plain = opened(bundle)
    chosen = []
    for gpu in (timed, plain):
        tokens = [gpu.backend.prefill(0, PROMPT, 0).tokens()[0]]
        for step in range(4):
            tokens += gpu.backend.decode(tokens[-1:], [len(PROMPT) + step]).tokens()
        chosen.append(tokens)
    assert chosen[0] == chosen[1]
    assert (timed.device.captures, plain.device.captures) == (0, ROWS)
    assert plain.backend.take_layer_times() == []
    assert all(context.profiler is None for context in plain.engine.contexts)
    plain.backend.close()


@pytest.mark.parametrize(
    ("gone", "named"),
    [
        ("IProfiler", "IProfiler"),
        ("IExecutionContext", "IExecutionContext.profiler, .*IExecutionContext.report_to_prof"),
    ],
)
def test_a_library_without_a_profiler_is_refused(bundle: Bundle, gone: str, named: str) -> None:
    device = HostDevice()
    engine = cpu_engine(bundle, device)
    library = cpu_library(engine, VERSION)
    delattr(library.module, gone)
    with pytest.raises(BackendError, match=f"^TensorRT for RTX {VERSION} cannot time its layers, it has no {named}"):
        TensorRTBackend(bundle, engine.record, library, device, max_seq=POSITIONS, max_batch=1, time_layers=True)
    assert device.live == 0


def test_a_plan_that_reports_no_layer_is_refused(bundle: Bundle) -> None:
    device = HostDevice()
    engine = cpu_engine(bundle, device)
    engine.layers = ()
    library = cpu_library(engine, VERSION)
    with pytest.raises(BackendError, match="reported no layer of a run"):
        TensorRTBackend(bundle, engine.record, library, device, max_seq=POSITIONS, max_batch=1, time_layers=True)
    assert device.live == 0


def test_the_installed_package_has_the_profiler_and_plans_keep_their_layers_names() -> None:
    library = load_library("tensorrt-rtx")
    LayerTimes(library)
    config = library.module.Builder(library.logger).create_builder_config()
    assert config.profiling_verbosity == tensorrt_rtx.ProfilingVerbosity.LAYER_NAMES_ONLY


@pytest.fixture
def operators(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The operators of a profile's document, of two rows after prompts that are longer than one run's prefill."""
    device = HostDevice()
    stand_in(monkeypatch, cpu_engine(bundle, device))
    sweep = Sweep(prompt_tokens=(CHUNK + 4,), new_tokens=(3,), batch=(2,), repeats=1, warmup=0)
    options = Options(backend="tensorrt-rtx", max_seq=POSITIONS, cold_start=False, operators=True)
    document = profile_document(measure(bundle, sweep, options))
    assert device.live == 0
    return document["operators"]


def test_a_profile_on_tensorrt_groups_layers_by_part(operators: Any, bundle: Bundle) -> None:
    assert (operators["profiler"], operators["prompt_tokens"], operators["batch"]) == ("TensorRT", CHUNK, 2)
    for phase, runs in (("prefill", 3), ("decode", 24)):
        times = operators[phase]
        assert times["runs"] == runs
        assert list(times["parts_ms"]) == [part for part in PARTS if part != "other"]
        rows = {(row["part"], row["operator"]): row for row in times["operators"]}
        layers = bundle.architecture.layers
        assert rows["attention", "TRT_Attention"]["calls"] == layers
        assert (
            rows["attention projections", "MatMul"]["calls"] == rows["MLP projections", "MatMul"]["calls"] == 2 * layers
        )
        assert rows["lm_head", "MatMul"]["calls"] == 1
        assert 0 < times["operators_ms"] <= times["run_ms"]

"""The GPU kit's stages on the backend for CUDA: all of their calls, without results and without PyTorch's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from noop_cuda import BUNDLES

from starling.engine.bundle.manifest import Bundle


class AnyModule(ModuleType):
    """Stands for PyTorch, which has no room beside this CUDA: every name is there, every call gives 0."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return AnyModule(name)

    def __call__(self, *_: object, **__: object) -> int:
        return 0


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """With the card's machine."""
    before = {*sys.modules}
    monkeypatch.setitem(sys.modules, "torch", AnyModule("torch"))
    stages = {name: import_module(f"starling.profiling.gpu.stages.{name}") for name in ("kit", "machines")}
    results = import_module("starling.profiling.gpu.stages.results_file").Results(tmp_path / "results.jsonl", "noop")
    machine = stages["machines"].CudaMachine()
    monkeypatch.setattr(machine, "memory_in_use", lambda: 0)
    yield stages["kit"].Kit(BUNDLES, BUNDLES, results, machine)
    for name in {*sys.modules} - before:
        if name.startswith("starling.export") or name.startswith("starling.profiling"):
            del sys.modules[name]


def lines(kit: Any) -> list[dict[str, Any]]:
    read: Any = import_module("starling.profiling.gpu.stages.results_file").read_results
    return list(read(kit.results.path))


@pytest.mark.parametrize("kernels", [False, True])
def test_ways_of_decoding(kit: Any, kernels: bool) -> None:
    correctness = import_module("starling.profiling.gpu.stages.correctness")
    correctness.compare_ways(kit, Bundle.open(BUNDLES / "tiny-int8-fp16"), kernels=kernels)
    launched, fed, plain, ways = lines(kit)
    assert [way["captured"] for way in (launched, fed, plain)] == [True, True, False]
    assert [way["kernels"] for way in (launched, fed, plain)] == [["sm90"], [None]][not kernels] * 3
    assert ways["steps"] == 40


def test_steps_are_timed_with_every_setting(kit: Any) -> None:
    throughput = import_module("starling.profiling.gpu.stages.throughput")
    bundle = Bundle.open(BUNDLES / "tiny-int8-fp16")
    setups = (throughput.OURS, throughput.RUNTIMES, *throughput.CHANGED)
    for setup in setups:
        throughput.measure(kit, bundle, setup, (1, 4))
    throughput.chunks(kit, bundle, throughput.OURS)
    found = lines(kit)
    assert not [line for line in found if "failed" in line]
    steps = [line for line in found if line.get("how") == "starling"]
    assert len(steps) == len(setups) * 2 * 2
    assert all(line["step_ms"] > 0 and line["step_bytes"] > 0 for line in steps)


def test_draws_and_steps_that_draw_are_timed(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = import_module("starling.profiling.gpu.stages.sampling_kernel")
    monkeypatch.setattr(sampling, "_ROWS", (1, 4))
    monkeypatch.setattr(type(kit), "large", lambda _, precision: f"tiny-{precision}")
    sampling.run(kit)
    found = lines(kit)
    assert not [line for line in found if "failed" in line]
    assert len([line for line in found if "right" in line]) == 2 * len(sampling.WAYS)
    assert len([line for line in found if "us" in line]) == 2 * 2 * len(sampling.WAYS)
    steps = [line for line in found if "step_ms_by_way" in line]
    assert [line["rows"] for line in steps] == [1, 4] * 2
    assert all(time > 0 for line in steps for time in line["step_ms_by_way"].values())


def test_first_tokens_are_timed_by_length_and_block(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    throughput = import_module("starling.profiling.gpu.stages.throughput")
    monkeypatch.setattr(type(kit), "large", lambda _, precision: f"tiny-{precision}")
    throughput.run_first_tokens(kit)
    found = lines(kit)
    assert not [line for line in found if "failed" in line]
    sizes = [line.get("weight_block_mb") for line in found]
    assert {size: sizes.count(size) for size in sizes} == {None: 18, 16: 9, 32: 9, 64: 9, 128: 9, 256: 9}


def test_a_cache_is_filled_with_nan(kit: Any) -> None:
    backend = kit.machine.open(Bundle.open(BUNDLES / "tiny-fp16"), rows=2, positions=128)
    try:
        kit.machine.fill_cache_with_nan(backend, 2)
        host = backend._memory.host((16,), "float16")
        for address, _ in backend._cache.parts(1):
            backend._memory.copy(host.ctypes.data, address, host.nbytes)
            assert np.isnan(host).all()
    finally:
        backend.close()

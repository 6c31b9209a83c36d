"""Which engine is taken, and the one line that says why none is: library, GPU, version, target, bundle, size."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import starling
from cpu_plan import PLAN, POSITIONS, ROWS, VERSION, cpu_engine, cpu_library, record_of
from host_device import HostDevice

from starling.engine.backends.cuda.cuda_device import CudaDevice
from starling.engine.backends.cuda.device_memory import DeviceMemory
from starling.engine.backends.open_backend import open_backend
from starling.engine.backends.tensorrt.plan_record import BundleDigests, EngineRecord
from starling.engine.backends.tensorrt.run.execution import PlanExecution
from starling.engine.backends.tensorrt.run.select_engine import Wanted, select_engine
from starling.engine.backends.tensorrt.run.tensorrt_backend import TensorRTBackend
from starling.engine.backends.tensorrt.runtimes import Library, load_library
from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import BackendError, PlanError, UserError
from starling.engine.names import BACKENDS

NO_GPU = r"no usable NVIDIA GPU here \(CUDA error (35|100): .+\); install its driver, or use --backend onnxruntime-cpu"


def has_gpu() -> bool:
    try:
        CudaDevice()
    except BackendError:
        return False
    return True


without_gpu = pytest.mark.skipif(has_gpu(), reason="there is a GPU")


@pytest.fixture
def bundle(tiny_tensorrt_bundle: Path, tmp_path: Path) -> Bundle:
    """The bundle in a folder of its own, with nothing in it but what its record needs."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    for file in tiny_tensorrt_bundle.rglob("*"):
        if file.is_file() and "engines" not in file.parts:
            copy = folder / file.relative_to(tiny_tensorrt_bundle)
            copy.parent.mkdir(exist_ok=True)
            copy.hardlink_to(file)
    return Bundle.open(folder)


@pytest.fixture(scope="module")
def library() -> Library:
    return cpu_library(None, VERSION)


def add_engine(bundle: Bundle, name: str = "small", **changes: object) -> EngineRecord:
    """Write an engine's record, and some bytes as its plan."""
    record = replace(record_of(bundle), name=name, **changes)  # type: ignore[arg-type]
    record.plan_path.write_bytes(PLAN)
    (record.folder / f"{name}.json").write_text(json.dumps(record.to_json()))
    return record


def wanted(library: Library, *, target: str = "sm89", max_seq: int = POSITIONS, max_batch: int = ROWS) -> Wanted:
    return Wanted(library, target, max_seq, max_batch)


def test_the_smallest_engine_that_fits_is_taken(bundle: Bundle, library: Library) -> None:
    add_engine(bundle, "large", max_seq=512)
    add_engine(bundle, "small")
    add_engine(bundle, "narrow", max_batch=1)
    add_engine(bundle, "elsewhere", targets=("sm120",))
    assert select_engine(bundle, wanted(library)).name == "small"
    assert select_engine(bundle, wanted(library, max_seq=100)).name == "large"
    assert select_engine(bundle, wanted(library, max_batch=1)).name == "narrow"
    assert select_engine(bundle, wanted(library, target="sm120")).name == "elsewhere"
    assert select_engine(bundle, wanted(library, max_batch=1), "large").name == "large"


@pytest.mark.parametrize(
    ("changes", "needs", "line"),
    [
        ({"runtime_version": "1.5.0"}, {}, "built by tensorrt-rtx 1.5.0, here is tensorrt-rtx 1.7.1.116"),
        ({"runtime": "tensorrt"}, {}, "built by tensorrt 1.7.1.116, here is tensorrt-rtx 1.7.1.116"),
        ({}, {"target": "sm120"}, "built for sm89, this GPU is sm120"),
        ({}, {"max_batch": 5}, "holds 4 rows of KV cache, 5 are wanted: ask for at most 4, or: .* --max-batch 5"),
        ({}, {"max_seq": 65}, "holds 64 positions of KV cache, 65 are wanted: ask for at most 64, or: .* --max-seq 65"),
        ({"built_from": BundleDigests("a" * 64, "b" * 64, None)}, {}, "built from another bundle: graph bbbbbbbbbbbb…"),
    ],
)
def test_an_engine_for_something_else_is_refused_by_a_line_that_names_both(
    bundle: Bundle, library: Library, changes: dict[str, object], needs: dict[str, int], line: str
) -> None:
    add_engine(bundle, **changes)
    for name in (None, "small"):
        with pytest.raises(PlanError, match=line) as caught:
            select_engine(bundle, wanted(library, **needs), name)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_the_nearest_of_several_refusals_is_told(bundle: Bundle, library: Library) -> None:
    add_engine(bundle, "other", runtime="tensorrt")
    add_engine(bundle, "short", max_seq=32)
    with pytest.raises(PlanError, match=r"engine short holds 32 positions .* \(1 other engine\(s\) fit less\)"):
        select_engine(bundle, wanted(library))


def test_a_bundle_without_engines_names_the_command(bundle: Bundle, library: Library) -> None:
    with pytest.raises(PlanError, match="has no engines; make one with: starling build"):
        select_engine(bundle, wanted(library))
    with pytest.raises(PlanError, match="no engine 'fast'"):
        select_engine(bundle, wanted(library), "fast")


def test_a_bundle_of_another_dialect_names_the_option(tiny_bundle: Path) -> None:
    with pytest.raises(PlanError, match=r"dialect ort, which TensorRT does not run right: .* --dialect tensorrt"):
        open_backend(Bundle.open(tiny_bundle), name="tensorrt-rtx", max_seq=8)


def test_an_engine_is_for_tensorrt_alone(tiny_bundle: Path) -> None:
    with pytest.raises(UserError, match="engine 'small' is named, which onnxruntime-cpu does not run"):
        open_backend(Bundle.open(tiny_bundle), name="onnxruntime-cpu", engine="small", max_seq=8)


def test_rows_that_would_begin_off_the_grid_are_refused(bundle: Bundle) -> None:
    device = HostDevice()
    narrow = replace(bundle, architecture=replace(bundle.architecture, kv_heads=1, head_dim=8))
    engine = cpu_engine(bundle, device)
    record = replace(engine.record, max_seq=20)
    with pytest.raises(BackendError, match=r"takes 640 bytes, no multiple of 256, .* multiple of 64, not 20"):
        TensorRTBackend(narrow, record, cpu_library(engine, VERSION), device, max_seq=20, max_batch=2)
    assert device.live == 0


def test_a_plan_that_does_not_load_is_one_line(bundle: Bundle, library: Library) -> None:
    device = HostDevice()
    with pytest.raises(BackendError, match=r"TensorRT for RTX 1\.7\.1\.116 cannot load .*small\.plan: Error Code 1"):
        TensorRTBackend(bundle, add_engine(bundle), library, device, max_seq=8, max_batch=1)
    assert device.live == 0


def test_a_plan_that_writes_its_cache_elsewhere_is_refused(bundle: Bundle) -> None:
    device = HostDevice()
    engine = cpu_engine(bundle, device)
    first, *rest = engine.record.aliases
    engine.record = replace(engine.record, aliases=tuple(rest))
    with pytest.raises(BackendError, match=f"writes {first[1]} to the memory of no input, not of {first[0]}"):
        TensorRTBackend(bundle, record_of(bundle), cpu_library(engine, VERSION), device, max_seq=8, max_batch=1)


@without_gpu
def test_the_real_library_without_a_gpu_is_one_line(bundle: Bundle) -> None:
    memory = DeviceMemory(HostDevice())
    with pytest.raises(BackendError, match=r"TensorRT for RTX [\d.]+ cannot load .*small\.plan: ") as caught:
        PlanExecution(load_library("tensorrt-rtx"), add_engine(bundle), memory)
    assert "\n" not in str(caught.value)


@without_gpu
def test_no_gpu_is_one_line() -> None:
    with pytest.raises(BackendError, match=NO_GPU):
        CudaDevice()


def test_no_cuda_bindings_names_both_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)  # what a missing package is to `import`
    with pytest.raises(BackendError, match=r"not installed .*: pip install .*\[tensorrt-rtx\]' or .*\[tensorrt\]'"):
        CudaDevice()


def test_no_tensorrt_names_its_extra(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(BackendError, match=r"not installed .*: pip install .*\[tensorrt-rtx\]'"):
        open_backend(bundle, name="tensorrt-rtx", max_seq=8)


@without_gpu
def test_auto_runs_the_reference_graph_and_says_so(bundle: Bundle) -> None:
    add_engine(bundle)
    backend = open_backend(bundle, max_seq=8)
    assert backend.name == "onnxruntime"
    assert backend.note is not None
    assert "since TensorRT cannot run here: no usable NVIDIA GPU here" in backend.note
    backend.close()
    with pytest.raises(BackendError, match=NO_GPU):
        open_backend(bundle, engine="small", max_seq=8)


def test_auto_stays_on_onnxruntime_for_its_own_dialect(tiny_bundle: Path) -> None:
    backend = open_backend(Bundle.open(tiny_bundle), max_seq=8)
    assert (backend.name, backend.note) == ("onnxruntime", None)
    backend.close()


@without_gpu
@pytest.mark.parametrize("command", [["generate", "Hello"], ["chat"], ["profile"]])
def test_the_command_line_ends_in_one_line_without_a_gpu(bundle: Bundle, command: list[str]) -> None:
    add_engine(bundle)
    name, *prompt = command
    finished = starling(name, bundle.folder, *prompt, "--backend", "tensorrt-rtx", "--engine", "small")
    assert finished.returncode == 1
    assert finished.stdout == ""
    [line] = finished.stderr.strip().splitlines()
    assert "no usable NVIDIA GPU here (CUDA error" in line


@without_gpu
def test_the_command_line_notes_what_runs_instead(bundle: Bundle) -> None:
    finished = starling("generate", bundle.folder, "--raw", "Hello", "--max-tokens", "2", "--max-seq", "32")
    assert finished.returncode == 0
    assert "ONNX Runtime runs the bundle's reference graph, since TensorRT cannot run here" in finished.stderr


def test_the_registry_knows_both_runtimes() -> None:
    assert {"tensorrt", "tensorrt-rtx"} <= set(BACKENDS)

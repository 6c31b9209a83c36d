"""The ONNX Runtime backend: one KV cache, past and present in the same memory, rows that do not disturb each other."""

import os
import sys
import tracemalloc
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np
import numpy.typing as npt
import onnxruntime  # type: ignore[import-untyped]
import pytest

from starling.engine.backends.onnxruntime.onnxruntime_backend import OrtBackend
from starling.engine.backends.onnxruntime.step_buffers import StepOutputs
from starling.engine.backends.open_backend import open_backend
from starling.engine.bundle.file_records import TensorSpec
from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import BackendError, UserError
from starling.engine.host import default_threads
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.exporter import ExportOptions, export_bundle

MAX_SEQ, ROWS = 64, 3


def opened(folder: Path, *, max_batch: int = ROWS, prefill_chunk: int = 512) -> OrtBackend:
    backend = open_backend(
        Bundle.open(folder),
        name="onnxruntime-cpu",
        max_seq=MAX_SEQ,
        max_batch=max_batch,
        threads=1,
        prefill_chunk=prefill_chunk,
    )
    assert isinstance(backend, OrtBackend)
    return backend


@pytest.fixture
def backend(tiny_bundle: Path) -> Iterator[OrtBackend]:
    backend = opened(tiny_bundle)
    yield backend
    backend.close()


def tokens(count: int, *, seed: int = 0) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).integers(3, 30_000, count)


def prefill(backend: OrtBackend, row: int, ids: npt.NDArray[np.int64], start: int = 0) -> npt.NDArray[np.float32]:
    """Logits [vocab] after the last token."""
    return backend.prefill(row, ids, start).logits()[0].copy()


def decode(backend: OrtBackend, ids: Iterable[int], positions: Iterable[int]) -> npt.NDArray[np.float32]:
    """Logits [rows, vocab]."""
    return backend.decode(list(ids), list(positions)).logits().copy()


def assert_close(got: npt.ArrayLike, wanted: npt.ArrayLike, *, tolerance: float = 1e-4) -> None:
    """Equal but for the rounding of float32 sums that were taken in another order."""
    np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), rtol=tolerance, atol=tolerance)


def cache(backend: OrtBackend) -> dict[str, npt.NDArray[np.float32]]:
    """The backend's own cache memory, [rows, kv_heads, max_seq, head_dim] per layer and side."""
    return {name: value.numpy() for name, value in backend._cache.items()}


def test_chunked_prefill_equals_whole_prefill(tiny_bundle: Path) -> None:
    ids = tokens(23)
    whole = prefill(opened(tiny_bundle), 0, ids)
    assert_close(prefill(opened(tiny_bundle, prefill_chunk=5), 0, ids), whole)


def test_prefill_after_a_cache_equals_whole_prefill(backend: OrtBackend) -> None:
    ids = tokens(20)
    whole = prefill(backend, 0, ids)
    backend.prefill(1, ids[:13], 0)
    assert_close(prefill(backend, 1, ids[13:], 13), whole)


def test_prefill_overwrites_what_lies_after_its_start(backend: OrtBackend) -> None:
    ids = tokens(20)
    fresh = prefill(backend, 0, ids)
    backend.prefill(1, np.concatenate([ids[:8], tokens(30, seed=1)]), 0)
    assert_close(prefill(backend, 1, ids[8:], 8), fresh)


def test_decode_equals_prefill_of_one_token_more(backend: OrtBackend) -> None:
    ids = tokens(12)
    whole = prefill(backend, 0, ids)
    backend.prefill(1, ids[:11], 0)
    backend.prefill(0, ids[:11], 0)
    decoded = decode(backend, ids[[11, 11]], [11, 11])
    assert_close(decoded, [whole, whole])


def test_rows_of_different_lengths_decode_as_alone(backend: OrtBackend) -> None:
    prompts = [tokens(7, seed=1), tokens(19, seed=2), tokens(3, seed=3)]
    alone = [prefill(backend, 0, prompt) for prompt in prompts]
    for row, prompt in enumerate(prompts):
        backend.prefill(row, prompt[:-1], 0)
    together = decode(backend, [prompt[-1] for prompt in prompts], [len(prompt) - 1 for prompt in prompts])
    assert_close(together, alone)


def test_past_and_present_are_the_same_memory(backend: OrtBackend) -> None:
    backend.prefill(1, tokens(9), 0)
    for name, buffer in cache(backend).items():
        assert np.abs(buffer[1, :, :9]).sum(axis=(0, 2)).all(), f"{name}: present did not arrive in the past buffer"
        buffer[1, :, :9] = 0
        assert not buffer.any(), f"{name}: something was written outside row 1, positions 0 to 8"


def test_decode_writes_only_its_rows_and_positions(backend: OrtBackend) -> None:
    backend.decode([5, 6], [4, 10])
    for name, buffer in cache(backend).items():
        written = np.abs(buffer).sum(axis=(1, 3)) > 0
        assert sorted(zip(*np.nonzero(written), strict=True)) == [(0, 4), (1, 10)], name


def test_kv_cache_bytes_are_those_of_the_buffers(backend: OrtBackend) -> None:
    assert backend.kv_cache_bytes == sum(buffer.nbytes for buffer in cache(backend).values())


def test_nothing_is_allocated_or_bound_per_decoded_token(backend: OrtBackend) -> None:
    token, position = [7], [0]

    def decode_100() -> npt.NDArray[np.float32]:
        for count in range(100):
            position[0] = count % MAX_SEQ
            output = backend.decode(token, position)
            output.tokens()
            logits = output.logits()
        return logits

    first, step, traced = decode_100(), backend._steps[1], []
    for _ in range(3):  # the interpreter's own small change is not the same each time
        tracemalloc.start()
        logits = decode_100()
        traced.append(tracemalloc.get_traced_memory())
        tracemalloc.stop()
    assert np.shares_memory(first, logits)
    assert backend._steps == {1: step}
    # One object kept per token would be 4,800 bytes, a row of logits over 100 KB.
    assert min(grown for grown, _ in traced) < 4_000
    assert min(peak for _, peak in traced) < 8_000


def test_model_seconds_are_part_of_the_wall_time(backend: OrtBackend) -> None:
    begin, before = perf_counter(), backend.model_seconds
    backend.decode([7], [0])
    assert 0 < backend.model_seconds - before < perf_counter() - begin


@pytest.mark.parametrize("position", [MAX_SEQ, 10**6])
def test_decode_outside_the_cache_is_refused(backend: OrtBackend, position: int) -> None:
    with pytest.raises(BackendError, match=rf"position {position} of row 0 lies outside the KV cache"):
        backend.decode([7], [position])


def test_prefill_outside_the_cache_is_refused(backend: OrtBackend) -> None:
    with pytest.raises(BackendError, match="position 64 of row 0 lies outside"):
        backend.prefill(0, tokens(5), 60)
    with pytest.raises(BackendError, match="of row 3 lies outside"):
        backend.prefill(ROWS, tokens(5), 0)


@pytest.fixture(scope="module")
def tiny_canonical_bundle(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same random weights as `tiny_bundle`, as standard operators."""
    folder = tmp_path_factory.mktemp("canonical") / "tiny"
    export_bundle(tiny_checkpoint, folder, ExportOptions(dialect="canonical", check=False))
    return folder


def test_canonical_dialect_agrees_with_ort(tiny_bundle: Path, tiny_canonical_bundle: Path) -> None:
    prompts = [tokens(17, seed=1), tokens(6, seed=2)]
    logits = []
    for folder in (tiny_bundle, tiny_canonical_bundle):
        backend = opened(folder, prefill_chunk=4)
        for row, prompt in enumerate(prompts):
            backend.prefill(row, prompt[:-1], 0)
        last = [prompt[-1] for prompt in prompts]
        logits.append(decode(backend, last, [16, 5]))
    assert_close(logits[0], logits[1], tolerance=1e-3)


def step_outputs(folder: Path, kind: str, logits: list[list[float]]) -> StepOutputs:
    """Output buffers of that type as a step of the graph would leave them."""
    bundle = Bundle.open(folder)
    graph = replace(bundle.graph, outputs=(TensorSpec("logits", kind, ("batch", 1, len(logits[0]))),))
    architecture = replace(bundle.architecture, vocab_size=len(logits[0]))
    buffers, values = (
        StepOutputs(replace(bundle, graph=graph, architecture=architecture), len(logits)),
        np.array(logits, np.float32),
    )
    bits = {"float16": values.astype(np.float16).view(np.uint16), "bfloat16": values.view(np.uint32) >> 16}
    buffers._raw[:] = bits.get(kind, values)
    return buffers


KINDS = ("float32", "float16", "bfloat16")


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_every_type_are_read_as_float32(tiny_bundle: Path, kind: str) -> None:
    wanted = [[0.0, -1.5, 3.25, np.inf, -np.inf]]
    read = step_outputs(tiny_bundle, kind, wanted).output(1).logits()
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("peak", [np.nan, np.inf])
def test_a_greatest_logit_that_is_no_number_chooses_nothing_in_its_row_alone(
    tiny_bundle: Path, kind: str, peak: float
) -> None:
    buffers = step_outputs(tiny_bundle, kind, [[0.0, 3.25, 1.0], [0.0, 1.0, peak]])
    assert buffers.output(1).tokens() == [1]
    assert buffers.output(2).tokens() == [1, -1]


def test_bf16_bundle_on_the_cpu_names_the_way_out(tiny_bundle: Path) -> None:
    bundle = replace(Bundle.open(tiny_bundle), dtype="bf16", kernel_graph=None)
    with pytest.raises(BackendError, match="bf16 has no CPU kernels: export with --dtype fp32, or use CUDA"):
        open_backend(bundle, name="onnxruntime-cpu", max_seq=8)


def test_bf16_bundle_without_kernels_says_why(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STARLING_CPU_KERNELS", "0")
    bundle = replace(Bundle.open(tiny_bundle), dtype="bf16")
    with pytest.raises(
        BackendError, match=r"no CPU kernels \(without CPU kernels: switched off by .*=0\): export with"
    ):
        open_backend(bundle, name="onnxruntime-cpu", max_seq=8)


def test_unknown_backend_lists_the_known_ones(tiny_bundle: Path) -> None:
    with pytest.raises(BackendError, match="unknown backend 'cuda'; choose one of auto, onnxruntime, "):
        open_backend(Bundle.open(tiny_bundle), name="cuda", max_seq=8)


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="CUDA is installed")
def test_cuda_without_its_package_names_the_extra(tiny_bundle: Path) -> None:
    with pytest.raises(BackendError, match=r"without CUDA; pip uninstall onnxruntime, then pip install .*\[gpu\]'; or"):
        open_backend(Bundle.open(tiny_bundle), name="onnxruntime-cuda", max_seq=8)


def test_no_onnxruntime_names_both_extras(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # what a missing package is to `import`
    with pytest.raises(BackendError, match=r"not installed .*: pip install .*\[cpu\]', or pip install .*\[gpu\]'"):
        open_backend(Bundle.open(tiny_bundle), max_seq=8)


def test_unreadable_graph_is_one_line(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(BackendError, match="cannot load") as caught:
        open_backend(replace(Bundle.open(tiny_bundle), folder=tmp_path), max_seq=8)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sizes", [{"max_seq": 0}, {"max_seq": 8, "max_batch": 0}, {"max_seq": 8, "threads": 0}])
def test_sizes_below_one_are_refused(tiny_bundle: Path, sizes: dict[str, int]) -> None:
    with pytest.raises(UserError, match="each must be at least 1"):
        open_backend(Bundle.open(tiny_bundle), **sizes)  # type: ignore[arg-type]


def test_default_threads_are_physical_cores_of_this_process() -> None:
    assert 1 <= default_threads() <= len(os.sched_getaffinity(0))

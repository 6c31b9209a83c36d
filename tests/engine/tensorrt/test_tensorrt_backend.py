"""The TensorRT backend's logic on the CPU: memory, profiles, graphs, choices; hardware and plan are stood in for."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from cpu_plan import (
    CHUNK,
    POSITIONS,
    ROWS,
    VERSION,
    CpuContext,
    CpuEngine,
    CpuRuntime,
    CpuRuntimeCache,
    CpuRuntimeConfig,
    Opened,
    cpu_engine,
    cpu_library,
    opened,
    tensorrt_rtx,
)
from host_device import HostDevice

from starling.engine.backends.backend import GREEDY, Backend, DeviceChoice
from starling.engine.backends.cuda.cuda_device import host_view
from starling.engine.backends.open_backend import open_backend
from starling.engine.backends.tensorrt.run.tensorrt_backend import TensorRTBackend
from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import BackendError
from starling.engine.generation.sampler import device_choice, make_sampler
from starling.engine.generation.sampling_params import SamplingParams


@pytest.fixture(scope="module")
def bundle(tiny_tensorrt_bundle: Path) -> Bundle:
    return Bundle.open(tiny_tensorrt_bundle)


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache directory, for one test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gpu(bundle: Bundle) -> Iterator[Opened]:
    gpu = opened(bundle)
    yield gpu
    gpu.backend.close()


@pytest.fixture(scope="module")
def oracle(bundle: Bundle) -> Iterator[Backend]:
    """The reference graph on ONNX Runtime, driven by its own backend."""
    backend = open_backend(bundle, name="onnxruntime-cpu", max_seq=POSITIONS, max_batch=ROWS, threads=1)
    yield backend
    backend.close()


def tokens(count: int, *, seed: int = 0) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).integers(3, 30_000, count)


def assert_close(got: npt.ArrayLike, wanted: npt.ArrayLike) -> None:
    """Equal but for the rounding of float32 sums that were taken in another order."""
    np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), rtol=1e-4, atol=1e-4)


def cache(gpu: Opened) -> dict[str, npt.NDArray[np.float32]]:
    """The cache in the device's memory, [rows, kv_heads, positions, head_dim] per layer and side."""
    gpu.backend.drop()
    shape = (ROWS, *gpu.backend._cache.row_shape)
    return {past: host_view(address, shape, "float32") for past, _, address in gpu.backend._cache.rows_from(0)}


def decoded(backend: TensorRTBackend, first: list[int], positions: list[int], count: int) -> list[list[int]]:
    """The tokens of `count` plain steps, each fed by the host with the tokens of the step before."""
    steps = [first]
    for step in range(count):
        steps.append(backend.decode(steps[-1], [position + step for position in positions]).tokens())
    return steps[1:]


def test_prefill_in_chunks_and_decode_agree_with_onnxruntime(gpu: Opened, oracle: Backend) -> None:
    prompts = [tokens(count, seed=count) for count in (5, CHUNK, 21, 2)]
    last, positions = [], []
    for row, prompt in enumerate(prompts):
        output, wanted = gpu.backend.prefill(row, prompt, 0), oracle.prefill(row, prompt, 0)
        assert_close(output.logits(), wanted.logits())
        assert output.tokens() == wanted.tokens()
        last += output.tokens()
        positions.append(len(prompt))
    for rows in (4, 2, 3):
        output, wanted = (backend.decode(last[:rows], positions[:rows]) for backend in (gpu.backend, oracle))
        assert_close(output.logits(), wanted.logits())
        assert output.tokens() == wanted.tokens()


def test_prefill_after_a_cache_equals_whole_prefill(gpu: Opened) -> None:
    ids = tokens(30)
    whole = gpu.backend.prefill(0, ids, 0).logits().copy()
    gpu.backend.prefill(3, ids[:13], 0)
    assert_close(gpu.backend.prefill(3, ids[13:], 13).logits(), whole)


def test_a_step_writes_its_rows_and_positions_alone(gpu: Opened) -> None:
    for buffer in cache(gpu).values():
        buffer[:] = 0  # what was run when the backend opened wrote the first positions
    gpu.backend.prefill(2, tokens(9), 0)
    gpu.backend.decode([7, 8], [4, 10])
    for name, buffer in cache(gpu).items():
        written = np.abs(buffer).sum(axis=(1, 3)) > 0
        expected = {(2, position) for position in range(9)} | {(0, 4), (1, 10)}
        assert set(zip(*(indices.tolist() for indices in np.nonzero(written)), strict=True)) == expected, name


def test_clearing_a_row_zeroes_it_and_no_other(gpu: Opened) -> None:
    for row in range(gpu.backend.max_batch):
        gpu.backend.prefill(row, tokens(9), 0)
    before = {name: array.copy() for name, array in cache(gpu).items()}
    gpu.backend.clear(1)
    gpu.backend.drop()
    for name, array in cache(gpu).items():
        assert not array[1].any()
        assert before[name][1].any()
        others = [row for row in range(gpu.backend.max_batch) if row != 1]
        np.testing.assert_array_equal(array[others], before[name][others])


def test_steps_launched_ahead_choose_what_steps_fed_by_the_host_choose(gpu: Opened) -> None:
    prompts = [tokens(count, seed=count) for count in (5, 12, 3)]
    first = [gpu.backend.prefill(row, prompt, 0).tokens()[0] for row, prompt in enumerate(prompts)]
    plain = decoded(gpu.backend, first, [5, 12, 3], 6)
    for row, prompt in enumerate(prompts):
        gpu.backend.prefill(row, prompt, 0)
    gpu.backend.launch(3)
    ahead = []
    for _ in range(6):
        gpu.backend.launch(3)
        ahead.append(gpu.backend.tokens())
    assert ahead == plain
    assert len({token for step in plain for token in step}) > 6, "a model that repeats itself would prove nothing"


def test_fewer_rows_go_on_with_what_more_rows_left(gpu: Opened) -> None:
    first = [gpu.backend.prefill(row, tokens(4, seed=row), 0).tokens()[0] for row in range(3)]
    plain = decoded(gpu.backend, first, [4, 4, 4], 3)
    for row in range(3):
        gpu.backend.prefill(row, tokens(4, seed=row), 0)
    gpu.backend.launch(3)
    gpu.backend.launch(1)
    assert gpu.backend.tokens() == plain[0]
    assert gpu.backend.tokens() == plain[1][:1]


def test_no_step_is_launched_after_the_end_of_the_cache(gpu: Opened) -> None:
    gpu.backend.prefill(0, tokens(POSITIONS - 1), 0)
    gpu.backend.prefill(1, tokens(3), 0)
    assert gpu.backend.can_launch(2)
    gpu.backend.launch(2)
    gpu.backend.tokens()
    assert not gpu.backend.can_launch(2)
    with pytest.raises(BackendError, match="position 64 of row 1 lies outside the KV cache"):
        gpu.backend.launch(2)
    with pytest.raises(BackendError, match="position 64 of row 0 lies outside"):
        gpu.backend.decode([5], [POSITIONS])
    with pytest.raises(BackendError, match="of row 4 lies outside"):
        gpu.backend.prefill(ROWS, tokens(3), 0)


def test_drafts_are_refused(gpu: Opened) -> None:
    for attempt in (gpu.backend.check_verifies, lambda: gpu.backend.verify(0, [5, 6], 3)):
        with pytest.raises(BackendError, match="no draft can be verified: speculate with a bundle of --dialect ort"):
            attempt()


def test_scores_are_refused(gpu: Opened) -> None:
    for attempt in (gpu.backend.check_scores, lambda: gpu.backend.score(0, tokens(2), 3)):
        with pytest.raises(BackendError, match="no prompt can be scored: score with a bundle of --dialect ort"):
            attempt()


def test_two_steps_at_most_are_on_their_way(gpu: Opened) -> None:
    gpu.backend.prefill(0, tokens(3), 0)
    gpu.backend.launch(1)
    assert gpu.backend.can_launch(1)
    gpu.backend.launch(1)
    assert not gpu.backend.can_launch(1)
    gpu.backend.tokens()
    assert gpu.backend.can_launch(1)


def test_work_left_behind_disturbs_nothing(gpu: Opened) -> None:
    ids = tokens(11)
    wanted = gpu.backend.prefill(0, ids, 0).tokens()
    gpu.backend.launch(1)
    gpu.backend.launch(1)
    assert gpu.backend.prefill(0, ids, 0).tokens() == wanted


def test_a_graph_for_each_number_of_rows_is_captured_when_the_backend_opens(gpu: Opened) -> None:
    assert (gpu.device.captures, gpu.device.launches) == (ROWS, 0)
    live = gpu.device.live
    for rows in (1, 2, 1, 4, 2):
        gpu.backend.decode([5] * rows, [3] * rows)
    assert (gpu.device.captures, gpu.device.launches) == (ROWS, 5)
    assert gpu.device.live == live, "a step allocates nothing"


def test_a_plan_that_cannot_be_captured_runs_without_a_graph(bundle: Bundle) -> None:
    gpu, captured = opened(bundle, capturable=False), opened(bundle)
    for backend in (gpu.backend, captured.backend):
        backend.prefill(0, tokens(5), 0)
    assert decoded(gpu.backend, [9], [5], 4) == decoded(captured.backend, [9], [5], 4)
    assert gpu.device.captures == 0


def test_logits_come_to_the_host_when_asked_for(gpu: Opened) -> None:
    before = gpu.device.bytes_to_host
    output = gpu.backend.decode([5, 6], [0, 0])
    assert output.tokens() == output.tokens()
    assert gpu.device.bytes_to_host - before == 2 * 8
    assert output.logits().shape == (2, gpu.backend.vocab_size)
    assert gpu.device.bytes_to_host - before == 2 * 8 + 2 * 4 * gpu.backend.vocab_size


SAMPLED = SamplingParams(temperature=0.9, top_k=40, top_p=0.95, seed=11)


def test_drawn_on_the_device_is_what_the_host_draws(gpu: Opened) -> None:
    ids, draws = tokens(10), device_choice(SAMPLED)
    assert draws is not None
    gpu.backend.choose(1, draws, len(ids) - 1)
    host = make_sampler(SAMPLED)
    output = gpu.backend.prefill(1, ids, 0)
    chosen, wanted = [output.tokens()[0]], [host(output.logits()[0])]
    for step in range(12):
        output = gpu.backend.decode([5, chosen[-1]], [0, len(ids) + step])
        chosen.append(output.tokens()[1])
        wanted.append(host(output.logits()[1]))
    assert chosen == wanted
    assert chosen[0] != int(output.logits()[1].argmax())


def test_a_row_chooses_by_its_own_settings(gpu: Opened) -> None:
    draws = device_choice(SAMPLED)
    assert draws is not None
    greedy = [gpu.backend.prefill(row, tokens(6), 0).tokens() for row in range(2)]
    gpu.backend.choose(1, draws, 5)
    drawn = gpu.backend.prefill(1, tokens(6), 0).tokens()
    assert greedy[0] == greedy[1] == gpu.backend.prefill(0, tokens(6), 0).tokens()
    gpu.backend.choose(1, GREEDY, 0)
    assert gpu.backend.prefill(1, tokens(6), 0).tokens() == greedy[1] != drawn


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.8),
        SamplingParams(temperature=0.8, top_k=257),
        SamplingParams(temperature=0.8, top_k=40, min_p=0.1),
        SamplingParams(temperature=0.8, top_k=40, repetition_penalty=1.1),
        SamplingParams(repetition_penalty=1.1),
    ],
)
def test_what_a_graph_cannot_choose_is_left_to_the_host(gpu: Opened, params: SamplingParams) -> None:
    choice = device_choice(params)
    assert choice is None or not gpu.backend.can_choose(choice)


def test_greedy_and_top_k_within_the_limit_are_chosen_on_the_device() -> None:
    assert device_choice(SamplingParams(seed=3)) == GREEDY
    assert device_choice(SamplingParams(temperature=0.5, top_k=256, top_p=0.9, seed=3)) == DeviceChoice(
        0.5, 256, 0.9, 3
    )


def test_logits_that_are_no_numbers_show_as_no_token(gpu: Opened) -> None:
    gpu.backend.prefill(0, tokens(4), 0)
    for buffer in cache(gpu).values():
        buffer[0, :, :4] = np.nan
    gpu.backend.launch(1)
    assert gpu.backend.tokens() == [-1]


def test_close_frees_everything(bundle: Bundle) -> None:
    gpu = opened(bundle)
    gpu.backend.decode([5], [0])
    gpu.backend.launch(1)
    assert gpu.device.live > 20
    gpu.backend.close()
    gpu.backend.close()
    assert gpu.device.live == 0


def test_what_was_allocated_is_freed_where_there_is_no_room(bundle: Bundle) -> None:
    device = HostDevice(room=2**21)
    engine = cpu_engine(bundle, device)
    with pytest.raises(BackendError, match="no room"):
        TensorRTBackend(bundle, engine.record, cpu_library(engine, VERSION), device, max_seq=POSITIONS, max_batch=ROWS)
    assert device.live == 0


def test_memory_of_the_cache_is_that_of_the_rows_asked_for(bundle: Bundle) -> None:
    for rows in (1, 3):
        gpu = opened(bundle, max_batch=rows)
        assert gpu.backend.kv_cache_bytes == bundle.kv_cache.bytes_per_token * POSITIONS * rows
        gpu.backend.close()


def test_contexts_share_memory_and_compile_for_what_they_are_for(gpu: Opened) -> None:
    prefill, *decodes = gpu.engine.contexts
    kernels, graphs = tensorrt_rtx.DynamicShapesKernelSpecializationStrategy, tensorrt_rtx.CudaGraphStrategy
    assert [context.profile for context in gpu.engine.contexts] == [0] + [1] * ROWS
    assert len({context.memory for context in gpu.engine.contexts}) == 1
    assert prefill.config.dynamic_shapes_kernel_specialization_strategy == kernels.LAZY
    assert all(step.config.dynamic_shapes_kernel_specialization_strategy == kernels.EAGER for step in decodes)
    for context in gpu.engine.contexts:
        assert context.config.cuda_graph_strategy == graphs.DISABLED
        assert context.config.strategy == tensorrt_rtx.ExecutionContextAllocationStrategy.USER_MANAGED


def test_compiled_kernels_are_kept_in_the_users_cache(bundle: Bundle, cache_home: Path) -> None:
    first = opened(bundle)
    [file] = cache_home.rglob("*.cache")
    assert file.read_bytes() == b"kernels of this machine"
    first.backend.close()
    again = opened(bundle)
    assert again.engine.contexts[0].config.cache is not None
    assert again.engine.contexts[0].config.cache.kernels == b"kernels of this machine"
    again.backend.close()
    assert list(cache_home.rglob("*")).count(file) == 1


def test_a_cache_that_cannot_be_kept_is_no_error(bundle: Bundle, cache_home: Path) -> None:
    cache_home.write_text("a file where the folder should be")
    opened(bundle).backend.close()


def test_the_stand_ins_have_the_methods_of_tensorrt_alone() -> None:
    for ours, theirs in (
        (CpuContext, tensorrt_rtx.IExecutionContext),
        (CpuEngine, tensorrt_rtx.ICudaEngine),
        (CpuRuntime, tensorrt_rtx.Runtime),
        (CpuRuntimeCache, tensorrt_rtx.IRuntimeCache),
        (CpuRuntimeConfig, tensorrt_rtx.IRuntimeConfig),
    ):
        methods = {name for name, value in vars(ours).items() if callable(value) and not name.startswith("_")}
        assert methods <= set(dir(theirs)), ours

"""The backend for CUDA, on ONNX Runtime's CPU provider and a stream that does its work late."""

import ctypes
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cuda_stand_in import RUNS_TO_CAPTURE, cuda_backend
from host_device import HostDevice

from starling.engine import Engine
from starling.engine.backends.backend import DeviceChoice
from starling.engine.backends.onnxruntime.onnxruntime_cuda import OrtCudaBackend
from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import BackendError
from starling.engine.generation.results import GenerationResult
from starling.engine.generation.sampler import TokenLogprob
from starling.engine.generation.sampling_params import SamplingParams
from starling.engine.kernels.cuda import reference
from starling.engine.serving_loop import ServingLoop
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.exporter import ExportOptions, export_bundle
from starling.export.quantization.blocks import BlockQuantization

POSITIONS, ROWS = 96, 3
PROMPTS = [[1, 420, 6316, 28781], [1, 7596, 1247, 28747, 26256, 2936, 7653, 1413], list(range(900, 930))]
GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)
emulates = pytest.mark.skipif(shutil.which("g++") is None, reason="the kernel is compiled with g++")


@pytest.fixture(scope="module", params=[None, "int8"])
def bundle(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Checkpoint
) -> Bundle:
    folder = tmp_path_factory.mktemp("cuda") / "bundle"
    how = None if request.param is None else BlockQuantization(request.param)
    export_bundle(tiny_checkpoint, folder, ExportOptions(dtype="fp16", quantization=how))
    return Bundle.open(folder)


@pytest.fixture(scope="module")
def oracle(bundle: Bundle) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STARLING_CPU_KERNELS", "0")  # they round nothing to float16 between the products
        engine = Engine(bundle, backend="onnxruntime-cpu", max_seq=POSITIONS, max_batch=ROWS, threads=1)
    with engine:
        assert engine.backend.steps_ahead is None
        yield engine


@contextmanager
def engine_on_cuda(
    bundle: Bundle,
    refuses: Exception | None = None,
    samples: bool = False,
    device: HostDevice | None = None,
    **settings: Any,
) -> Iterator[tuple[Engine, OrtCudaBackend]]:
    """An engine whose backend is the one for CUDA."""
    device = device or HostDevice()

    def open_backend(bundle: Bundle, *, max_seq: int, max_batch: int, **_: object) -> OrtCudaBackend:
        room = {"max_seq": max_seq, "max_batch": max_batch, "prefill_chunk": 8}
        return cuda_backend(bundle, device, refuses=refuses, samples=samples, **room)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("starling.engine.loaded_bundle.open_backend", open_backend)
        room = {"max_seq": POSITIONS, "max_batch": ROWS, **settings}
        with Engine(bundle, **room) as engine:
            assert isinstance(engine.backend, OrtCudaBackend)
            yield engine, engine.backend
    assert device.live == 0


def runs(backend: OrtCudaBackend) -> list[str]:
    """What the session ran, by the names of CUDA graphs; -1 outside of one."""
    ran: list[str] = backend._runs.session.runs
    return ran


def same(got: list[GenerationResult], expected: list[GenerationResult]) -> None:
    assert [result.tokens for result in got] == [result.tokens for result in expected]
    assert [result.text for result in got] == [result.text for result in expected]


def test_tokens_are_those_of_the_cpu(bundle: Bundle, oracle: Engine) -> None:
    with engine_on_cuda(bundle) as (engine, _):
        same(engine.generate(PROMPTS, GREEDY), oracle.generate(PROMPTS, GREEDY))
        for prompt in PROMPTS:  # rows that held another prompt
            same([engine.generate(prompt, GREEDY)], [oracle.generate(prompt, GREEDY)])


def test_a_decode_step_is_one_run_of_its_graph(bundle: Bundle) -> None:
    with engine_on_cuda(bundle) as (engine, backend):
        opening = list(runs(backend))
        engine.generate(PROMPTS[0], GREEDY)
        answer = runs(backend)[len(opening) :]
    captured = [graph for graph in "123" for _ in range(RUNS_TO_CAPTURE + 1)]
    assert opening == ["-1", *captured]
    assert answer == ["-1"] + ["1"] * (GREEDY.max_tokens - 1)


def test_a_greedy_step_brings_eight_bytes_a_row_to_the_host(bundle: Bundle) -> None:
    with engine_on_cuda(bundle) as (engine, backend):
        engine.generate(PROMPTS, GREEDY)
        device = backend._memory.device
        assert isinstance(device, HostDevice)
        before = device.bytes_to_host
        engine.generate(PROMPTS, GREEDY)
        assert device.bytes_to_host - before == GREEDY.max_tokens * 8 * len(PROMPTS)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "seed": 5},
        {"repetition_penalty": 1.3},
        {"logprobs": 3},
        {"temperature": 1.2, "seed": 1},
    ],
    ids=str,
)
def test_what_the_host_chooses_is_what_it_chooses_on_the_cpu(
    bundle: Bundle, oracle: Engine, changes: dict[str, Any]
) -> None:
    params = replace(GREEDY, **changes)
    with engine_on_cuda(bundle) as (engine, _):
        got, expected = engine.generate(PROMPTS, params), oracle.generate(PROMPTS, params)
    same(got, expected)
    assert [result.logprobs for result in got] == [result.logprobs for result in expected]


DRAWN = replace(GREEDY, temperature=0.8, top_p=0.95, seed=5)
WAYS_OF_DRAWING = [
    DRAWN,
    replace(DRAWN, top_p=1.0),
    replace(DRAWN, top_k=40, top_p=0.9, seed=6),
    replace(DRAWN, top_k=700, temperature=1.5),
    replace(DRAWN, top_p=1.0, min_p=0.02),
]


@emulates
@pytest.mark.parametrize("params", WAYS_OF_DRAWING, ids=["top_p", "all", "top_k", "wide top_k", "min_p"])
def test_tokens_are_drawn_on_the_device_as_the_host_draws_them(
    bundle: Bundle, oracle: Engine, params: SamplingParams
) -> None:
    with engine_on_cuda(bundle, samples=True) as (engine, backend):
        device = backend._memory.device
        assert isinstance(device, HostDevice)
        before, launches, ran = device.bytes_to_host, device.launches, len(runs(backend))
        got = engine.generate(PROMPTS, params)
        assert device.bytes_to_host - before == params.max_tokens * 8 * len(PROMPTS)
        assert device.launches - launches == params.max_tokens - 1, "a step is one graph"
        assert runs(backend)[ran:] == ["-1"] * sum(-(-len(prompt) // 17) for prompt in PROMPTS)
        same(engine.generate(PROMPTS, params), got)
        same(engine.generate(PROMPTS, GREEDY), oracle.generate(PROMPTS, GREEDY))
    same(got, oracle.generate(PROMPTS, params))


@emulates
@pytest.mark.parametrize("refuses", [None, RuntimeError("not permitted")])
def test_rows_that_draw_and_rows_that_do_not_run_together(
    bundle: Bundle, oracle: Engine, refuses: Exception | None
) -> None:
    settings = [GREEDY, DRAWN, replace(DRAWN, max_tokens=7), replace(GREEDY, max_tokens=9), replace(DRAWN, logprobs=1)]
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(len(settings))]
    with engine_on_cuda(bundle, refuses, samples=True) as (engine, _), ServingLoop(engine) as loop:
        requests = [loop.submit(prompt, params) for prompt, params in zip(prompts, settings, strict=True)]
        got = [request.result() for request in requests]
    same(got, [oracle.generate(prompt, params) for prompt, params in zip(prompts, settings, strict=True)])


class NoCapture(HostDevice):
    """On which nothing but ONNX Runtime itself can capture."""

    def capture(self, stream: int, work: Any) -> int:
        super().destroy_graph(super().capture(stream, work))
        raise BackendError("operation not permitted")


@emulates
def test_where_a_draw_cannot_be_captured_the_kernel_follows_the_steps_own_graph(bundle: Bundle, oracle: Engine) -> None:
    with engine_on_cuda(bundle, samples=True, device=NoCapture()) as (engine, backend):
        ran = len(runs(backend))
        same([engine.generate(PROMPTS[0], DRAWN)], [oracle.generate(PROMPTS[0], DRAWN)])
        assert runs(backend)[ran:] == ["-1"] + ["1"] * (DRAWN.max_tokens - 1)
        assert backend.note == "the kernel that draws tokens is no part of a step's CUDA graph: operation not permitted"


@emulates
def test_each_position_of_a_verified_draft_and_of_scored_tokens_is_drawn_with_its_own_number(bundle: Bundle) -> None:
    backend = cuda_backend(bundle, HostDevice(), samples=True, max_seq=POSITIONS, max_batch=ROWS)
    choice = DeviceChoice(temperature=0.8, top_k=0, top_p=0.95, seed=5)
    noise = choice.noise(POSITIONS)
    backend.choose(1, choice, 3)  # the prompt's last position has the first number
    for run, start in ((lambda: backend.prefill(1, np.arange(900, 904), 0), 3),
                       (lambda: backend.verify(1, [5, 6, 7], 4), 4),
                       (lambda: backend.score(1, np.arange(40, 60), 7), 7)):  # fmt: skip
        output = run()
        logits = output.logits()
        rows = len(logits)
        settings = zip(
            (choice.temperature, choice.top_k, choice.top_p, choice.min_p), ("f4", "i8", "f4", "f4"), strict=True
        )
        draws = reference.Draws(*(np.full(rows, value, t) for value, t in settings), noise[start - 3 :][:rows])
        assert output.tokens() == reference.sampled(logits, draws).tolist()
    backend.close()


def test_requests_of_a_serving_loop_come_and_go(bundle: Bundle, oracle: Engine) -> None:
    settings = [
        replace(GREEDY, max_tokens=length, temperature=heat, seed=3)
        for length, heat in ((5, 0), (31, 0), (17, 0.8), (2, 0), (23, 0), (9, 0.8), (30, 0))
    ]
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(len(settings))]
    with engine_on_cuda(bundle) as (engine, _), ServingLoop(engine) as loop:
        requests = [loop.submit(prompt, params) for prompt, params in zip(prompts, settings, strict=True)]
        got = [request.result() for request in requests]
    same(got, [oracle.generate(prompt, params) for prompt, params in zip(prompts, settings, strict=True)])


def test_a_row_is_filled_to_its_last_position(bundle: Bundle, oracle: Engine) -> None:
    long = replace(GREEDY, max_tokens=POSITIONS)
    prompt = list(range(100, 100 + POSITIONS - 2))
    with engine_on_cuda(bundle) as (engine, backend):
        opening = len(runs(backend))
        same([engine.generate(prompt, long)], [oracle.generate(prompt, long)])
        assert set(runs(backend)[opening:]) == {"-1", "1"}
        same([engine.generate(PROMPTS[0], long)], [oracle.generate(PROMPTS[0], long)])
        same([engine.generate(prompt, long)], [oracle.generate(prompt, long)])


def test_where_no_step_can_be_captured_all_goes_on_without(bundle: Bundle, oracle: Engine) -> None:
    with engine_on_cuda(bundle, refuses=RuntimeError("operation not permitted\nwhen capturing")) as (engine, backend):
        same(engine.generate(PROMPTS, GREEDY), oracle.generate(PROMPTS, GREEDY))
        assert backend.note is not None
        assert backend.note.startswith("decode steps run without CUDA graphs: ")
        assert backend.note.endswith(": operation not permitted")


def test_drafts_are_verified(bundle: Bundle, oracle: Engine) -> None:
    repeated = [1, *PROMPTS[1][1:] * 3]
    params = replace(GREEDY, max_tokens=40)
    with engine_on_cuda(bundle, speculation="prompt-lookup") as (engine, _):
        got = engine.generate(repeated, params)
    assert got.timings.drafted_tokens > 0
    same([got], [oracle.generate(repeated, params)])


def test_a_prompt_is_scored_and_the_steps_launched_after_it_go_on_from_there(bundle: Bundle, oracle: Engine) -> None:
    prompt = [1, *range(900, 930), *range(40, 70)]
    params = replace(GREEDY, prompt_logprobs=2)
    with engine_on_cuda(bundle) as (engine, backend):
        assert backend._scored is None, "it takes memory only where somebody asks"
        got = engine.generate([prompt, PROMPTS[0]], params)
        assert backend._scored is not None
        scores = engine.score(prompt, [[5, 6, 7], [9]])
    expected = oracle.generate([prompt, PROMPTS[0]], params)
    same(got, expected)
    for result, theirs in zip(got, expected, strict=True):
        check_entries(result.prompt_logprobs, theirs.prompt_logprobs)
    for score, wanted in zip(scores, oracle.score(prompt, [[5, 6, 7], [9]]), strict=True):
        check_entries(score.tokens, wanted.tokens)
        assert score.is_greedy == wanted.is_greedy


def check_entries(got: Sequence[TokenLogprob | None] | None, expected: Sequence[TokenLogprob | None] | None) -> None:
    assert got is not None
    assert expected is not None
    assert [entry and entry.token for entry in got] == [entry and entry.token for entry in expected]
    values = [entry.logprob for entry in got if entry]
    assert values == pytest.approx([entry.logprob for entry in expected if entry], abs=0.02)


def test_logits_that_are_no_numbers_end_the_request_and_leave_nothing(bundle: Bundle, oracle: Engine) -> None:
    with engine_on_cuda(bundle) as (engine, backend):
        stream = iter(engine.stream(PROMPTS[0], GREEDY))
        next(stream)
        for address, size in backend._cache.parts(0):
            ctypes.memset(address, 0xFF, size)
        with pytest.raises(BackendError, match="greatest logit is nan"):
            list(stream)
        same([engine.generate(PROMPTS[0], GREEDY)], [oracle.generate(PROMPTS[0], GREEDY)])


def test_a_bundle_of_fp32_has_no_graph_for_it(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    assert bundle.cuda_graph is None
    with pytest.raises(BackendError, match="has no graph for CUDA: export it again with --dtype fp16"):
        cuda_backend(bundle, HostDevice(), max_seq=8, max_batch=1)


@pytest.mark.parametrize(("position", "row"), [(POSITIONS, 0), (0, ROWS)])
def test_what_lies_outside_the_cache_is_refused(bundle: Bundle, position: int, row: int) -> None:
    backend = cuda_backend(bundle, HostDevice(), max_seq=POSITIONS, max_batch=ROWS)
    with pytest.raises(BackendError, match="outside the KV cache"):
        backend.prefill(row, np.array([1]), position)
    with pytest.raises(BackendError, match="outside the KV cache"):
        backend.decode([1] * (row + 1), [position] * (row + 1))
    with pytest.raises(BackendError, match="outside the KV cache"):
        backend.verify(row, [1], position)
    with pytest.raises(BackendError, match="18 tokens are to be verified in one step: give 1 to 17"):
        backend.verify(0, [1] * 18, 0)
    with pytest.raises(BackendError, match="outside the KV cache"):
        backend.score(row, np.array([1]), position)
    with pytest.raises(BackendError, match=f"are to be scored in one run: give 1 to {POSITIONS}"):
        backend.score(0, np.zeros(POSITIONS + 1, np.int64), 0)
    backend.close()


def test_an_int8_bundle_names_the_products_of_its_graph_for_the_kernels(bundle: Bundle) -> None:
    if bundle.quantization is None:
        assert bundle.cuda_kernels is None
        return
    assert bundle.cuda_kernels is not None
    shapes = {(each.k, each.n): (each.norm, each.around) for each in bundle.cuda_kernels.products}
    assert shapes == {
        (256, 6144): (True, "none"),
        (4096, 256): (False, "residual"),
        (256, 1024): (True, "gated"),
        (512, 256): (False, "residual"),
        (256, 32002): (True, "none"),
    }
    nodes = {
        node.op_type
        for node in onnx.load(bundle.folder / bundle.cuda_kernels.graph, load_external_data=False).graph.node
    }
    assert "QuantizedLinear" in nodes
    assert not nodes & {"MatMulNBits", "SkipSimplifiedLayerNormalization", "Sigmoid"}

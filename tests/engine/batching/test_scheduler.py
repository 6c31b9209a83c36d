"""Continuous batching, step by step: who joins, leaves, waits or fails never shows in another request's answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from starling.engine.backends.backend import StepOutput, Tokens
from starling.engine.backends.onnxruntime.onnxruntime_backend import OrtBackend
from starling.engine.batching.chunk_queue import ChunkQueue
from starling.engine.batching.prefill_pacing import GRAIN, PrefillPace
from starling.engine.batching.prefills import CROWD
from starling.engine.batching.request import Request, RequestHandle
from starling.engine.batching.scheduler import Scheduler
from starling.engine.batching.serving_stats import ServingCounters
from starling.engine.engine import Engine
from starling.engine.errors import BackendError, DeadlineExceeded, RequestFailed
from starling.engine.generation.results import GenerationChunk, GenerationResult
from starling.engine.generation.sampling_params import SamplingParams

ROWS, MAX_SEQ = 4, 96
SHORT, LONG = tuple(range(900, 905)), tuple(range(1000, 1061))


class Served:
    """A scheduler that is stepped by hand, and what it asked of the backend."""

    def __init__(self, engine: Engine, *, chunk: int = GRAIN) -> None:
        self.engine = engine
        self.counters = ServingCounters(ROWS, queue_limit=100)
        self.scheduler = Scheduler(engine.backend, self.counters, PrefillPace(chunk, slowdown=2))

    def submit(
        self,
        prompt: Sequence[int] = SHORT,
        tokens: int = 8,
        on_chunk: Callable[[GenerationChunk], None] | None = None,
        *,
        priority: int = 0,
        owner: str = "",
        **settings: Any,
    ) -> tuple[Request, RequestHandle]:
        sequence = self.engine.prepare(prompt, SamplingParams(**{"max_tokens": tokens, "ignore_eos": True, **settings}))
        sequence.submitted = perf_counter()
        request = Request(sequence, ChunkQueue(on_chunk), priority=priority, owner=owner)
        assert self.counters.enter()
        self.scheduler.add(request)
        return request, RequestHandle(request)

    def run(self) -> None:
        for _ in range(10_000):
            if self.scheduler.idle:
                return
            self.scheduler.serve_step()
        raise AssertionError("the scheduler never came to an end")

    def alone(self, prompt: Sequence[int] = SHORT, tokens: int = 8) -> GenerationResult:
        return self.engine.generate(list(prompt), max_tokens=tokens, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Iterator[Engine]:
    with Engine(tiny_bundle, backend="onnxruntime-cpu", max_seq=MAX_SEQ, max_batch=ROWS, threads=1) as engine:
        yield engine


@pytest.fixture(params=["mixed", "apart"])
def served(engine: Engine, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Served:
    """Prompts run in the steps of others where the CPU kernels run the bundle, and apart as everywhere else."""
    if request.param == "apart":
        monkeypatch.setattr(engine.backend, "most_mixed", 0)
    elif not engine.backend.most_mixed:
        pytest.skip("ONNX Runtime's own attention does not mix")
    return Served(engine)


def only_apart(served: Served) -> None:
    if served.engine.backend.most_mixed:
        pytest.skip("of prompts that run apart")


def even(served: Served) -> bool:
    stats = served.counters.snapshot()
    return stats.running == stats.waiting == 0 and stats.submitted == sum(stats.ended.values())


def test_requests_that_join_and_leave_answer_as_alone(served: Served) -> None:
    prompts = [tuple(range(first, first + 3 + 5 * i)) for i, first in enumerate(range(700, 1500, 80))]
    lengths = [3, 17, 8, 1, 12, 5, 20, 2, 9, 14]
    alone = [served.alone(prompt, length) for prompt, length in zip(prompts, lengths, strict=True)]
    handles = []
    for prompt, length in zip(prompts, lengths, strict=True):
        handles.append(served.submit(prompt, length)[1])
        served.scheduler.serve_step()
        served.scheduler.serve_step()
    served.run()
    for handle, expected in zip(handles, alone, strict=True):
        result = handle.result(0)
        assert (result.tokens, result.text, result.finish_reason) == (expected.tokens, expected.text, "length")
    assert len({result.tokens for result in alone}) == len(alone)
    assert even(served)


def test_a_long_prompt_is_prefilled_between_the_steps_of_the_others(served: Served) -> None:
    most = len(LONG)  # pieces may be of 2 tokens where the machine is busy
    expected = served.alone(tokens=most), served.alone(LONG, 5)
    running, handle = served.submit(tokens=most)
    while not running.sequence.tokens:
        served.scheduler.serve_step()
    long, long_handle = served.submit(LONG, 5)
    before = len(running.sequence.tokens)
    while not long.sequence.tokens:
        tokens = len(running.sequence.tokens)
        served.scheduler.serve_step()
        assert len(running.sequence.tokens) == tokens + 1, "every step gives the running request a token"
    assert len(running.sequence.tokens) - before >= 3, "the prompt came in several chunks"
    served.run()
    assert (handle.result(0).tokens, long_handle.result(0).tokens) == (expected[0].tokens, expected[1].tokens)


def test_the_prompts_of_a_burst_are_prefilled_before_those_that_began_go_far(served: Served) -> None:
    burst = [served.submit(LONG, tokens=40)[0] for _ in range(ROWS)]
    while not burst[-1].sequence.tokens:
        served.scheduler.serve_step()
    chunks = -(-len(LONG) // GRAIN)
    assert len(burst[0].sequence.tokens) <= (ROWS - 1) * chunks + ROWS
    served.run()
    assert even(served)


class _FavouredPace(PrefillPace):
    """Keeps how far the bound on each step was raised."""

    def __init__(self) -> None:
        super().__init__(GRAIN, slowdown=2)
        self.favours: list[float] = []

    def budget(self, rows: int, favour: float) -> float:
        self.favours += [favour] if rows else []
        return super().budget(rows, favour)

    def beside(self, rows: int, favour: float, drafted: int, position: float) -> int:
        self.favours.append(favour)
        return super().beside(rows, favour, drafted, position)


def test_requests_that_ran_before_a_prompt_came_are_held_up_less_the_more_they_are(
    engine: Engine,
) -> None:
    served, pace = Served(engine), _FavouredPace()
    served.scheduler = Scheduler(engine.backend, served.counters, pace)
    running = [served.submit(tokens=80)[0] for _ in range(2)]
    while not all(request.sequence.tokens for request in running):
        served.scheduler.serve_step()
    while perf_counter() < max(one.sequence.submitted + 2 * one.sequence.ttft_s for one in running):
        served.scheduler.serve_step()
    pace.favours.clear()
    served.submit(LONG, tokens=2)
    served.scheduler.serve_step()
    assert set(pace.favours) <= {1.0}, "one prompt beside two that ran before it"
    pace.favours.clear()
    served.submit(LONG, tokens=2)
    for _ in range(4):  # one of them may be a quiet step
        served.scheduler.serve_step()
    assert set(pace.favours) == {CROWD * 2 / 2}, "two prompts wait, and hold up two"
    served.run()
    assert even(served)


def test_a_decode_step_leaves_a_half_prefilled_row_below_it_right(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_apart(served)
    expected = served.alone(LONG, 6).tokens
    steps: list[tuple[list[int], list[int]]] = []
    decode = served.engine.backend.decode

    def recorded(tokens: Sequence[int], positions: Sequence[int]) -> StepOutput:
        steps.append((list(tokens), list(positions)))
        return decode(tokens, positions)

    first, _ = served.submit(tokens=2)
    served.submit(tokens=60)
    while not first.queue.complete:
        served.scheduler.serve_step()
    monkeypatch.setattr(served.engine.backend, "decode", recorded)
    long, handle = served.submit(LONG, 6)
    held = []
    while not long.sequence.tokens:
        held.append(long.written)
        served.scheduler.serve_step()
    assert long.row == 0, "the lowest free row, below the one that decodes"
    assert len(held) > 3
    for written, (tokens, positions) in zip(held[1:], steps[1:], strict=False):
        assert (tokens[0], positions[0]) == (LONG[written], written), "where the next chunk writes anyway"
    served.run()
    assert handle.result(0).tokens == expected


def test_free_rows_in_between_stay_inside_the_cache_and_the_next_prompt_is_right(served: Served) -> None:
    full = tuple(range(800, 800 + MAX_SEQ))
    expected = served.alone(LONG, 4).tokens, served.alone(full, 9).tokens
    assert len(expected[1]) == 1, "a prompt that fills the cache has room for one token"
    handles = [served.submit(full, 9)[1], served.submit(tokens=2)[1], served.submit(tokens=40)[1]]
    for _ in range(40):
        served.scheduler.serve_step()
    assert handles[1].done, "rows 0 and 1 are free, row 2 decodes"
    assert handles[0].result(0).tokens == expected[1]
    late = served.submit(LONG, 4)[1]
    served.run()
    assert late.result(0).tokens == expected[0]


def test_how_a_prompt_is_cut_does_not_show(engine: Engine) -> None:
    prompt = list(range(1000, 1066))
    whole = engine.backend.prefill(0, np.array(prompt), 0).logits()[0].copy()
    for chunk in (8, 13, 65):  # 65 would leave one token, and 13 does
        served = Served(engine, chunk=chunk)
        seen: list[np.ndarray] = []
        request, handle = served.submit(prompt, 1, logprobs=5)
        served.run()
        assert request.sequence.tokens[0] == whole.argmax()
        result = handle.result(0)
        assert result.logprobs is not None
        seen.append(np.array([value for _, value in result.logprobs[0].top]))
        total = np.log(np.exp(whole.astype(np.float64)).sum())
        np.testing.assert_allclose(seen[0], np.sort(whole)[::-1][:5] - total, rtol=0, atol=2e-5)


def test_rows_that_ask_for_nothing_besides_answer_as_those_that_do(served: Served) -> None:
    found = []
    settings: list[dict[str, Any]] = [{}, {"logprobs": 0}, {"stop": ("\0",)}]
    for one in settings:  # after each other: a step takes the short way where all its rows may
        chunks: list[GenerationChunk] = []
        _, handle = served.submit(LONG, 12, chunks.append, **one)
        served.run()
        result = handle.result(0)
        assert len(result.timings.itl_s) == len(result.timings.host_s) == 11
        pieces = [(chunk.text, chunk.token) for chunk in chunks]
        found.append((result.text, result.tokens, result.finish_reason, pieces))
    assert found[0] == found[1] == found[2]
    assert served.counters.snapshot().generated_tokens == 36


def test_first_come_first_served(served: Served) -> None:
    requests = [served.submit(tuple(range(900, 900 + 10 + i)), 6)[0] for i in range(12)]
    served.run()
    starts = [request.sequence.submitted + request.sequence.queue_s for request in requests]
    firsts = [request.sequence.submitted + request.sequence.ttft_s for request in requests]
    assert starts == sorted(starts)
    assert firsts == sorted(firsts)


def test_cancelling_takes_effect_within_one_step(served: Served) -> None:
    requests = [served.submit(tokens=80, prompt=LONG[:9])[0] for _ in range(ROWS)]
    prefilling_or_waiting = [served.submit(LONG)[0] for _ in range(2)]
    while not all(request.sequence.tokens for request in requests):
        served.scheduler.serve_step()
    for request in [requests[1], *prefilling_or_waiting]:
        request.cancelled = True
    served.scheduler.serve_step()
    for request in [requests[1], *prefilling_or_waiting]:
        assert request.queue.complete
        assert RequestHandle(request).result(0).finish_reason == "cancelled"
    stats = served.counters.snapshot()
    assert (stats.running, stats.waiting, stats.ended["cancelled"]) == (ROWS - 1, 0, 3)
    chunks = list(RequestHandle(requests[1]))
    assert chunks[-1].token is None
    assert chunks[-1].timings is not None
    assert "".join(chunk.text for chunk in chunks) == RequestHandle(requests[1]).partial.text
    served.run()
    assert even(served)


def test_what_is_late_ends_where_it_is_and_waiting_counts(served: Served) -> None:
    running, handle = served.submit(tokens=80)
    while len(running.sequence.tokens) < 3:
        served.scheduler.serve_step()
    for _ in range(ROWS):
        served.submit(tokens=60)
    waiting, _ = served.submit()
    running.deadline = waiting.deadline = perf_counter()
    served.scheduler.serve_step()
    assert running.queue.complete
    assert waiting.queue.complete
    with pytest.raises(Exception, match=r"its deadline passed after \d+ token"):
        handle.result(0)
    assert len(handle.partial.tokens) >= 3
    served.run()
    assert even(served)


@pytest.mark.parametrize("broken", ["sampler", "detokenizer", "reader"])
def test_a_request_that_fails_fails_alone(served: Served, broken: str) -> None:
    expected = served.alone(tokens=20).tokens

    def fails(*_: object) -> int:
        raise ValueError("broken on purpose")

    before, after = served.submit(tokens=20)[1], None
    on_chunk = fails if broken == "reader" else None
    request, handle = served.submit(LONG, 20, on_chunk=on_chunk)  # type: ignore[arg-type]
    after = served.submit(tokens=20)[1]
    if broken == "sampler":
        request.sequence.sample = fails
    if broken == "detokenizer":
        request.sequence.detokenizer = SimpleNamespace(push=fails, flush=str)
    served.run()
    with pytest.raises(RequestFailed, match="broken on purpose"):
        handle.result(0)
    assert before.result(0).tokens == after.result(0).tokens == expected
    assert served.counters.snapshot().ended == {"length": 2, "failed": 1}
    assert even(served)


def test_numbers_that_are_not_finite_end_their_own_row_and_stay_there(served: Served) -> None:
    expected = served.alone(tokens=20).tokens, served.alone(LONG, 9).tokens
    good, (bad, bad_handle) = served.submit(tokens=20)[1], served.submit(LONG, 20)
    while len(bad.sequence.tokens) < 2:
        served.scheduler.serve_step()
    backend = served.engine.backend
    assert isinstance(backend, OrtBackend)
    for buffer in backend._cache.values():
        buffer.numpy()[bad.row] = np.nan
    row = bad.row
    served.scheduler.serve_step()
    with pytest.raises(RequestFailed, match="greatest logit is nan"):
        bad_handle.result(0)
    later = served.submit(LONG, 9)[1]
    served.run()
    assert row == 1
    assert (good.result(0).tokens, later.result(0).tokens) == expected


def test_a_step_of_the_model_that_fails_ends_those_in_it_and_the_loop_goes_on(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = served.alone(LONG, 5).tokens
    running = [served.submit(tokens=60) for _ in range(ROWS)]
    waiting = served.submit(LONG, 5)[1]
    while not all(request.sequence.tokens for request, _ in running):
        served.scheduler.serve_step()
    with monkeypatch.context() as patch:
        patch.setattr(served.engine.backend, "_session", None)  # what is left of a session that broke
        served.scheduler.serve_step()
    for _, handle in running:
        with pytest.raises(RequestFailed, match="ONNX Runtime failed in a step of the model") as failure:
            handle.result(0)
        assert isinstance(failure.value.__cause__, BackendError)
    served.run()
    assert waiting.result(0).tokens == expected
    assert even(served)


def test_a_prefill_that_fails_ends_its_own_request(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    only_apart(served)
    expected = served.alone(tokens=20).tokens
    running, handle = served.submit(tokens=20)
    while not running.sequence.tokens:
        served.scheduler.serve_step()
    prefill = served.engine.backend.prefill

    def fails_later(row: int, tokens: Tokens, start: int) -> StepOutput:
        if start > 0:
            raise BackendError("no room")
        return prefill(row, tokens, start)

    monkeypatch.setattr(served.engine.backend, "prefill", fails_later)
    long = served.submit(LONG)[1]
    served.run()
    with pytest.raises(RequestFailed, match="no room"):
        long.result(0)
    assert handle.result(0).tokens == expected
    assert even(served)


def test_a_mixed_run_that_fails_ends_those_in_it(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    if not served.engine.backend.most_mixed:
        pytest.skip("of prompts that run in the steps of others")
    expected = served.alone(LONG, 5).tokens
    running, handle = served.submit(tokens=60)
    while len(running.sequence.tokens) < 3:
        served.scheduler.serve_step()
    waiting = served.submit(LONG, 5)[1]
    with monkeypatch.context() as patch:
        patch.setattr(served.engine.backend, "_session", None)
        served.scheduler.serve_step()
    for one in (handle, waiting):
        with pytest.raises(RequestFailed, match="ONNX Runtime failed in a step of the model"):
            one.result(0)
    later = served.submit(LONG, 5)[1]
    served.run()
    assert later.result(0).tokens == expected
    assert even(served)


def test_a_lower_priority_gets_the_next_free_row_and_is_prefilled_first(served: Served) -> None:
    running = [served.submit(tokens=6 + i)[0] for i in range(ROWS)]
    later = [served.submit(LONG, 2, priority=priority)[0] for priority in (3, 0, -1, 0)]
    served.run()
    assert all(request.sequence.finish_reason == "length" for request in (*running, *later))
    begun = sorted(later, key=lambda request: request.sequence.submitted + request.sequence.queue_s)
    assert [request.priority for request in begun] == [-1, 0, 0, 3]
    assert begun[1] is later[1], "of equals the first"


def test_owners_take_turns_however_much_one_of_them_asks(served: Served) -> None:
    many = [served.submit(tokens=4, owner="many")[0] for _ in range(3 * ROWS)]
    few = [served.submit(tokens=4, owner="few")[0] for _ in range(ROWS)]
    served.run()
    order = sorted([*many, *few], key=lambda request: request.sequence.submitted + request.sequence.queue_s)
    first = [request.owner for request in order[: 2 * ROWS]]
    assert first.count("few") >= ROWS - 1


def test_what_cannot_be_prefilled_by_its_deadline_ends_before_it_runs(served: Served) -> None:
    served.submit(LONG, 2)
    served.run()  # what a prompt's tokens take is known from now on
    before = served.counters.snapshot().prompt_tokens
    running, _ = served.submit(tokens=60)
    while not running.sequence.tokens:
        served.scheduler.serve_step()
    hopeless, handle = served.submit(LONG, 2)
    hopeless.deadline = perf_counter() + served.scheduler._prefills._pace.least_s(len(LONG)) / 2
    possible, _ = served.submit(LONG, 2)
    possible.deadline = perf_counter() + 60
    served.scheduler.serve_step()
    assert hopeless.queue.complete
    with pytest.raises(DeadlineExceeded, match="or its prompt cannot be run by then"):
        handle.result(0)
    served.run()
    assert possible.sequence.finish_reason == "length"
    assert served.counters.snapshot().prompt_tokens - before == len(SHORT) + len(LONG)
    assert even(served)


def test_settings_are_each_requests_own(served: Served) -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"temperature": 0.9, "seed": 3},
        {"temperature": 0.9, "seed": 4, "top_p": 0.8, "logprobs": 2},
        {"repetition_penalty": 1.3},
    ]
    alone = [served.engine.generate(list(SHORT), max_tokens=12, ignore_eos=True, **one) for one in settings]
    handles = [served.submit(tokens=12, **one)[1] for one in settings]
    served.run()
    results = [handle.result(0) for handle in handles]
    assert [result.tokens for result in results] == [result.tokens for result in alone]
    assert len({result.tokens for result in results}) == len(settings)
    assert results[2].logprobs is not None
    assert results[0].logprobs is None

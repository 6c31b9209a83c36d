"""The serving loop: many threads and tasks share one engine, every request ends, and all figures come out even."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from starling.engine.batching.request import RequestHandle
from starling.engine.engine import Engine
from starling.engine.errors import (
    ClosedError,
    DeadlineExceeded,
    PromptError,
    QueueFullError,
    RequestFailed,
    SamplingError,
    UserError,
)
from starling.engine.generation.results import GenerationChunk
from starling.engine.generation.sampling_params import SamplingParams
from starling.engine.serving_loop import ServingLoop

ROWS, MAX_SEQ, PATIENCE = 4, 128, 60.0
ENDLESS = SamplingParams(max_tokens=MAX_SEQ, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Iterator[Engine]:
    with Engine(tiny_bundle, backend="onnxruntime-cpu", max_seq=MAX_SEQ, max_batch=ROWS, threads=1) as engine:
        yield engine


@pytest.fixture
def loop(engine: Engine) -> Iterator[ServingLoop]:
    with ServingLoop(engine, queue_limit=16) as loop:
        yield loop


def some(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, ignore_eos=True)


def read(handle: RequestHandle) -> list[GenerationChunk]:
    return list(handle)


def blocked(loop: ServingLoop) -> tuple[threading.Event, RequestHandle]:
    """A request whose callback holds the loop's thread until the event is set."""
    go, there = threading.Event(), threading.Event()

    def hold(chunk: GenerationChunk) -> None:
        there.set()
        assert go.wait(PATIENCE)

    handle = loop.submit([900, 901], some(2), on_chunk=hold)
    assert there.wait(PATIENCE)
    return go, handle


def test_threads_get_what_the_engine_alone_gives(engine: Engine) -> None:
    prompts = [f"Story {number}: once upon a time" for number in range(9)]
    alone = [engine.generate(prompt, some(10 + number)) for number, prompt in enumerate(prompts)]
    chunks: dict[int, list[GenerationChunk]] = {}
    with ServingLoop(engine) as loop:

        def client(number: int) -> None:
            chunks[number] = read(loop.submit(prompts[number], some(10 + number)))

        threads = [threading.Thread(target=client, args=(number,)) for number in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert loop.stats().ended == {"length": len(prompts)}
    for number, expected in enumerate(alone):
        assert "".join(chunk.text for chunk in chunks[number]) == expected.text
        assert tuple(chunk.token for chunk in chunks[number]) == expected.tokens
        assert chunks[number][-1].finish_reason == "length"


def test_timings_are_what_the_reader_waits(loop: ServingLoop) -> None:
    begin = time.perf_counter()
    results = [handle.result(PATIENCE) for handle in [loop.submit("Hello", some(12)) for _ in range(3 * ROWS)]]
    total = time.perf_counter() - begin
    assert all(0 <= result.timings.queue_s < result.timings.ttft_s <= result.timings.total_s for result in results)
    assert results[-1].timings.queue_s > results[0].timings.total_s / 2, "the last ones waited for rows"
    assert max(result.timings.total_s for result in results) <= total
    assert all(len(result.timings.itl_s) == len(result.timings.host_s) == 11 for result in results)


def test_asyncio_reads_many_at_once_and_whoever_leaves_is_cancelled(engine: Engine, loop: ServingLoop) -> None:
    async def client(number: int) -> str:
        return "".join([chunk.text async for chunk in loop.submit(f"Story {number}:", some(20)).chunks()])

    async def leaver() -> RequestHandle:
        handle = loop.submit("A long one", ENDLESS)
        chunks = handle.chunks()
        await anext(chunks)
        await chunks.aclose()  # type: ignore[attr-defined]
        return handle

    async def main() -> tuple[list[str], RequestHandle]:
        texts = asyncio.gather(*(client(number) for number in range(6)))
        left = await leaver()
        return await texts, left

    texts, left = asyncio.run(main())
    assert left.result(PATIENCE).finish_reason == "cancelled"
    loop.close()
    assert texts == [engine.generate(f"Story {number}:", some(20)).text for number in range(6)]


def test_a_task_that_is_cancelled_cancels_its_request(loop: ServingLoop) -> None:
    async def main() -> RequestHandle:
        handle = loop.submit("A long one", ENDLESS)

        async def reader() -> None:
            async for _ in handle.chunks():
                pass

        task = asyncio.create_task(reader())
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return handle

    assert asyncio.run(main()).result(PATIENCE).finish_reason == "cancelled"


def test_the_queue_has_an_end(engine: Engine) -> None:
    with ServingLoop(engine, queue_limit=2) as loop:
        go, first = blocked(loop)
        accepted = [loop.submit("Hello", some(3)) for _ in range(ROWS - 1 + 2)]
        with pytest.raises(QueueFullError, match=r"2 request\(s\) already wait beside the 4 that run"):
            loop.submit("Hello", some(3))
        assert loop.stats().refused == 1
        go.set()
        for handle in [first, *accepted]:
            assert handle.result(PATIENCE).finish_reason == "length"
        assert loop.submit("Hello", some(3)).result(PATIENCE).finish_reason == "length"


def test_bad_input_is_refused_at_once_and_counted_nowhere(loop: ServingLoop) -> None:
    for prompt, error in (("", PromptError), ([1] * (MAX_SEQ + 1), PromptError), ([10**9], PromptError)):
        with pytest.raises(error):
            loop.submit(prompt, some(3))
    with pytest.raises(SamplingError):
        loop.submit("Hello", SamplingParams(top_p=2))
    for seconds in (0, -1.0, float("nan")):
        with pytest.raises(UserError, match=f"deadline_s is {seconds}"):
            loop.submit("Hello", deadline_s=seconds)
    assert (loop.stats().submitted, loop.stats().refused) == (0, 0)


def test_a_deadline_beyond_all_floats_never_comes(loop: ServingLoop) -> None:
    assert loop.submit("Hello", some(2), deadline_s=10**400).result(PATIENCE).finish_reason == "length"


def test_deadlines_and_cancelling_free_the_row(loop: ServingLoop) -> None:
    go, first = blocked(loop)
    late, cancelled = loop.submit("Hello", ENDLESS, deadline_s=0.01), loop.submit("Hello", ENDLESS)
    cancelled.cancel()
    time.sleep(0.02)
    go.set()
    with pytest.raises(DeadlineExceeded, match="its deadline passed after 0 token"):
        late.result(PATIENCE)
    assert late.partial.text == ""
    assert read(late)[-1].finish_reason == "deadline"
    assert cancelled.result(PATIENCE).finish_reason == "cancelled"
    first.result(PATIENCE)
    stats = loop.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.ended == {"deadline": 1, "cancelled": 1, "length": 1}


def test_a_callback_gets_every_chunk_and_the_result_with_the_last(loop: ServingLoop) -> None:
    seen: list[GenerationChunk] = []
    results: list[str] = []

    def on_chunk(chunk: GenerationChunk) -> None:
        seen.append(chunk)
        if chunk.finish_reason is not None:
            results.append(handle.result(0).text)

    handle = loop.submit("Hello", some(6), on_chunk=on_chunk)
    text = handle.result(PATIENCE).text
    loop.close()
    assert len(seen) == 6
    assert results == [text] == ["".join(chunk.text for chunk in seen)]
    with pytest.raises(UserError, match="on_chunk"):
        next(handle)


@pytest.mark.parametrize("leaving", [SystemExit(3), asyncio.CancelledError(), KeyboardInterrupt()], ids=repr)
def test_a_callback_that_would_end_a_thread_ends_its_own_request_only(
    loop: ServingLoop, leaving: BaseException
) -> None:
    def on_chunk(chunk: GenerationChunk) -> None:
        if chunk.finish_reason is None:
            raise leaving

    other = loop.submit("Hello", some(6))
    handle = loop.submit("Hello", some(6), on_chunk=on_chunk)
    with pytest.raises(RequestFailed, match=type(leaving).__name__):
        handle.result(PATIENCE)
    assert len(other.result(PATIENCE).tokens) == 6
    assert len(loop.submit("Hello", some(4)).result(PATIENCE).tokens) == 4


@pytest.mark.parametrize("end", [SystemExit(3), asyncio.CancelledError(), GeneratorExit()], ids=repr)
def test_whatever_ends_the_thread_fails_all_requests_and_closes_the_loop(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, end: BaseException
) -> None:
    def ends(*_: object) -> None:
        raise end

    loop = ServingLoop(engine, queue_limit=2 * ROWS)
    go, held = blocked(loop)
    handles = [loop.submit("Hello", some(6)) for _ in range(2 * ROWS)]
    with monkeypatch.context() as patch:
        patch.setattr(engine.backend, "decode", ends)
        go.set()
        for handle in [held, *handles]:
            with pytest.raises(RequestFailed, match=type(end).__name__):
                handle.result(PATIENCE)
    assert loop.failure is end
    with pytest.raises(ClosedError, match="ended by a failure"):
        loop.submit("Hello", some(2))
    stats = loop.stats()
    assert (stats.running, stats.waiting, stats.ended["failed"]) == (0, 0, len(handles) + 1)
    loop.close()
    with ServingLoop(engine) as after:
        assert len(after.submit("Hello", some(4)).result(PATIENCE).tokens) == 4
        assert after.failure is None


def test_a_callback_that_fails_hears_of_it_and_hurts_nobody(loop: ServingLoop) -> None:
    reasons: list[str | None] = []

    def on_chunk(chunk: GenerationChunk) -> None:
        reasons.append(chunk.finish_reason)
        raise OSError("the client is gone")

    other = loop.submit("Hello", some(30))
    handle = loop.submit("Hello", ENDLESS, on_chunk=on_chunk)
    with pytest.raises(RequestFailed, match="the client is gone"):
        handle.result(PATIENCE)
    assert other.result(PATIENCE).finish_reason == "length"
    assert reasons == [None, "failed"]


def test_closing_finishes_what_was_accepted_or_cancels_it(engine: Engine) -> None:
    loop = ServingLoop(engine)
    handles = [loop.submit("Hello", some(20)) for _ in range(2 * ROWS)]
    loop.close()
    assert [handle.result(0).finish_reason for handle in handles] == ["length"] * len(handles)
    with pytest.raises(ClosedError):
        loop.submit("Hello")
    loop.close()

    loop = ServingLoop(engine)
    handles = [loop.submit("Hello", ENDLESS) for _ in range(2 * ROWS)]
    loop.close(drain=False)
    assert {handle.result(0).finish_reason for handle in handles} <= {"cancelled", "length"}
    assert handles[-1].result(0).finish_reason == "cancelled"

    loop = ServingLoop(engine)
    handles = [loop.submit("Hello", ENDLESS) for _ in range(2 * ROWS)]
    loop.close(timeout_s=0)
    assert handles[-1].result(0).finish_reason == "cancelled"


def test_an_engine_has_one_user(engine: Engine) -> None:
    stream = engine.stream("Hello", ENDLESS)
    next(stream)
    with ServingLoop(engine) as loop:
        with pytest.raises(UserError, match="ended by a later generation"):
            next(stream)
        with pytest.raises(UserError, match="in use by a serving loop"):
            engine.generate("Hello")
        with pytest.raises(UserError, match="in use by a serving loop"):
            ServingLoop(engine)
        assert loop.submit("Hello", some(3)).result(PATIENCE).finish_reason == "length"
    assert engine.generate("Hello", some(3)).finish_reason == "length"


def test_closing_the_engine_closes_its_loop(tiny_bundle: Path) -> None:
    engine = Engine(tiny_bundle, backend="onnxruntime-cpu", max_seq=MAX_SEQ, threads=1)
    loop = ServingLoop(engine)
    handles = [loop.submit("Hello", ENDLESS) for _ in range(9)]
    engine.close()
    assert handles[-1].result(0).finish_reason == "cancelled"
    with pytest.raises(ClosedError):
        loop.submit("Hello")


def test_an_idle_loop_uses_no_processor(loop: ServingLoop) -> None:
    loop.submit("Hello", some(3)).result(PATIENCE)
    time.sleep(0.3)
    begin = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - begin < 0.05


def test_300_requests_with_random_ends_leave_nothing_behind(engine: Engine) -> None:
    """Of mixed length, some cancelled, late, refused or with a reader that breaks: each ends, once, and counts once."""
    with ServingLoop(engine, queue_limit=24) as loop:
        _storm(loop, requests=100, seed=1)
        gc.collect()
        before = _resident_bytes()
        refused = _storm(loop, requests=300, seed=2)
        gc.collect()
        grown = _resident_bytes() - before
        stats = loop.stats()
        assert (stats.running, stats.waiting) == (0, 0)
        assert stats.submitted == 400 - stats.refused == sum(stats.ended.values())
        assert refused > 0
        assert set(stats.ended) >= {"length", "cancelled", "deadline", "failed"}
        assert loop.submit("Hello", some(3)).result(PATIENCE).finish_reason == "length"
        assert grown < 30e6
    assert not [thread for thread in threading.enumerate() if thread.name == "starling-serving-loop"]


def _storm(loop: ServingLoop, *, requests: int, seed: int) -> int:
    """Six clients at once; returns how many requests were refused."""
    before = loop.stats().refused
    failures: list[BaseException] = []

    def client(number: int) -> None:
        try:
            _client(loop, random.Random(seed * 100 + number), requests // 6 + (number < requests % 6))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert not failures, failures
    return loop.stats().refused - before


def _client(loop: ServingLoop, rng: random.Random, requests: int) -> None:
    open_requests: list[tuple[str, RequestHandle]] = []
    for _ in range(requests):
        fate = rng.choice(["plain", "plain", "cancel", "deadline", "broken"])
        prompt = [rng.randrange(900, 20_000) for _ in range(rng.choice([1, 3, 9, 30, 90]))]
        params = SamplingParams(max_tokens=rng.randrange(1, 30), temperature=rng.choice([0.0, 0.8]), ignore_eos=True)
        deadline = rng.uniform(0.001, 0.1) if fate == "deadline" else None
        try:
            handle = loop.submit(prompt, params, deadline_s=deadline, on_chunk=_breaks if fate == "broken" else None)
        except QueueFullError:
            continue
        if fate == "cancel":
            threading.Timer(rng.uniform(0, 0.1), handle.cancel).start()
        open_requests.append((fate, handle))
        if rng.random() < 0.1:
            _end(*open_requests.pop())
    for fate, handle in open_requests:
        _end(fate, handle)


def _end(fate: str, handle: RequestHandle) -> None:
    expected: dict[str, Callable[[], set[str]]] = {
        "plain": lambda: {"length"},
        "cancel": lambda: {"length", "cancelled"},
        "deadline": lambda: {"length", "deadline"},
        "broken": lambda: {"failed", "length"},
    }
    try:
        reason: str = handle.result(PATIENCE).finish_reason
    except DeadlineExceeded:
        reason = "deadline"
    except RequestFailed:
        reason = "failed"
    assert reason in expected[fate](), (fate, reason)


def _breaks(chunk: GenerationChunk) -> None:
    raise ValueError("a reader that breaks")


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


def test_the_real_model_answers_as_alone_while_a_long_prompt_is_prefilled(demo_int8_bundle: Path) -> None:
    prompts = ["The capital of France is", "Water boils at", "The largest planet is"]
    long = "The keeper counts the ships that pass. " * 40
    with Engine(demo_int8_bundle, backend="onnxruntime-cpu", max_seq=512, max_batch=4) as engine:
        alone = [engine.generate(prompt, some(24)) for prompt in [*prompts, long]]
        with ServingLoop(engine) as loop:
            handles = [loop.submit(prompt, some(24)) for prompt in prompts]
            next(handles[0])
            handles.append(loop.submit(long, some(24)))
            results = [handle.result(PATIENCE) for handle in handles]
    assert [result.text for result in results] == [result.text for result in alone]
    assert [result.tokens for result in results] == [result.tokens for result in alone]
    assert "Paris" in results[0].text

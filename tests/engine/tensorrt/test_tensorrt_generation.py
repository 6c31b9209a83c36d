"""Generation on the TensorRT backend, on stand-ins for GPU and plan: steps launched ahead, chats, draws, ends."""

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cpu_plan import POSITIONS, ROWS, VERSION, cpu_engine, stand_in
from host_device import HostDevice

from starling.engine import Engine
from starling.engine.backends.tensorrt.run import tensorrt_backend
from starling.engine.backends.tensorrt.run.tensorrt_backend import TensorRTBackend
from starling.engine.bundle.manifest import Bundle
from starling.engine.generation.results import GenerationInterrupted, GenerationResult
from starling.engine.generation.sampling_params import SamplingParams
from starling.engine.serving_loop import ServingLoop

PROMPTS = [[1, 420, 6316, 28781], [1, 7596, 1247, 28747, 26256, 2936, 7653, 1413], [1, 315], list(range(900, 930))]
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.9, top_k=50, top_p=0.95, seed=5)


@pytest.fixture(scope="module")
def bundle(tiny_tensorrt_bundle: Path) -> Bundle:
    return Bundle.open(tiny_tensorrt_bundle)


@pytest.fixture(scope="module")
def device() -> HostDevice:
    return HostDevice()


@pytest.fixture(scope="module")
def engine(bundle: Bundle, device: HostDevice, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine of backend tensorrt-rtx; library, GPU and the plan are stand-ins."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        stand_in(patch, cpu_engine(bundle, device))
        with Engine(bundle, backend="tensorrt-rtx", max_seq=POSITIONS, max_batch=ROWS) as engine:
            yield engine
    assert device.live == 0


@pytest.fixture(scope="module")
def oracle(bundle: Bundle) -> Iterator[Engine]:
    """The same bundle on ONNX Runtime's CPU provider, which decodes in the plain loop."""
    with Engine(bundle, backend="onnxruntime-cpu", max_seq=POSITIONS, max_batch=ROWS, threads=1) as engine:
        assert engine.backend.steps_ahead is None
        yield engine


def test_threads_are_said_to_be_the_cpus(bundle: Bundle, device: HostDevice, engine: Engine) -> None:
    assert engine.backend.note is None
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch, cpu_engine(bundle, device))
        sizes = {"max_seq": POSITIONS, "max_batch": ROWS}
        with Engine(bundle, backend="tensorrt-rtx", threads=2, **sizes) as other:
            note = other.backend.note
    assert note == f"threads=2 changes nothing: they are the CPU's, and {engine.backend.provider} runs the bundle"


def same(ours: list[GenerationResult], theirs: list[GenerationResult]) -> None:
    """The two answered alike, token by token, and for the same reason."""
    assert [result.tokens for result in ours] == [result.tokens for result in theirs]
    assert [result.text for result in ours] == [result.text for result in theirs]
    assert [result.finish_reason for result in ours] == [result.finish_reason for result in theirs]


@pytest.mark.parametrize("params", [GREEDY, DRAWN, replace(DRAWN, seed=6)], ids=["greedy", "drawn", "drawn again"])
def test_answers_are_those_of_onnxruntime(engine: Engine, oracle: Engine, params: SamplingParams) -> None:
    same(engine.generate(PROMPTS, params), oracle.generate(PROMPTS, params))


def test_a_plan_without_draws_has_the_same_answers_and_the_host_draws(
    bundle: Bundle, oracle: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = HostDevice()
    plan = cpu_engine(bundle, device, greedy=True)
    assert not {tensor.name for tensor in plan.session.get_inputs()} & {"temperature", "top_k", "top_p"}
    stand_in(monkeypatch, plan)
    with Engine(bundle, backend="tensorrt-rtx", max_seq=POSITIONS, max_batch=ROWS) as engine:
        same(engine.generate(PROMPTS, GREEDY), oracle.generate(PROMPTS, GREEDY))
        assert device.bytes_to_host < 2 * 8 * 12 * len(PROMPTS)
        same(engine.generate(PROMPTS, DRAWN), oracle.generate(PROMPTS, DRAWN))


def test_steps_that_the_opening_left_out_are_made_when_they_are_met(
    bundle: Bundle, oracle: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = cpu_engine(bundle, HostDevice())
    stand_in(monkeypatch, plan)
    monkeypatch.setattr(tensorrt_backend, "MOST_ROWS_WARM", 2)
    with Engine(bundle, backend="tensorrt-rtx", max_seq=POSITIONS, max_batch=ROWS) as engine:
        assert len(plan.contexts) == 1 + 2
        same(engine.generate(PROMPTS, GREEDY), oracle.generate(PROMPTS, GREEDY))
        assert len(plan.contexts) == 1 + 3


def test_the_same_seed_draws_the_same_answer(engine: Engine) -> None:
    first, second = (engine.generate(PROMPTS[0], DRAWN).tokens for _ in range(2))
    other = engine.generate(PROMPTS[0], replace(DRAWN, seed=6)).tokens
    assert first == second != other


def test_a_row_draws_in_a_batch_what_it_draws_alone(engine: Engine) -> None:
    together = engine.generate(PROMPTS, DRAWN)
    assert [result.tokens for result in together] == [engine.generate(prompt, DRAWN).tokens for prompt in PROMPTS]


@pytest.mark.parametrize(
    "params",
    [
        replace(DRAWN, top_k=0),
        replace(DRAWN, min_p=0.05),
        replace(DRAWN, repetition_penalty=1.2),
        replace(GREEDY, logprobs=2),
        replace(DRAWN, logprobs=0),
    ],
    ids=["top_k off", "min_p", "penalty", "logprobs", "drawn with logprobs"],
)
def test_what_needs_the_logits_is_done_on_the_host(engine: Engine, oracle: Engine, params: SamplingParams) -> None:
    ours, theirs = engine.generate(PROMPTS[:2], params), oracle.generate(PROMPTS[:2], params)
    same(ours, theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert (our.logprobs is None) == (their.logprobs is None)
        for mine, wanted in zip(our.logprobs or (), their.logprobs or (), strict=True):
            assert mine.logprob == pytest.approx(wanted.logprob, abs=1e-4)


def test_no_logits_come_to_the_host_where_tokens_are_chosen_on_the_device(engine: Engine, device: HostDevice) -> None:
    before = device.bytes_to_host
    result = engine.generate(PROMPTS[0], DRAWN)
    assert device.bytes_to_host - before == 8 * len(result.tokens)


@pytest.mark.parametrize("lengths", [(12, 12, 12, 12), (2, 12, 5, 9), (12, 9, 5, 2), (5, 12, 1, 1), (1, 1, 1, 1)])
def test_rows_of_any_length_answer_as_in_the_plain_loop(
    engine: Engine, oracle: Engine, lengths: tuple[int, ...]
) -> None:
    stops = [
        oracle.generate(prompt, GREEDY).tokens[length - 1] for prompt, length in zip(PROMPTS, lengths, strict=True)
    ]
    params = replace(GREEDY, max_tokens=30, stop_token_ids=tuple(stops))
    ours, theirs = engine.generate(PROMPTS, params), oracle.generate(PROMPTS, params)
    same(ours, theirs)
    assert {result.finish_reason for result in ours} == {"stop"}


def test_a_row_that_filled_its_cache_leaves_the_others_right(engine: Engine, oracle: Engine) -> None:
    prompts = [list(range(700, 700 + POSITIONS - 3)), PROMPTS[0], PROMPTS[1]]
    long = replace(GREEDY, max_tokens=40)
    ours, theirs = engine.generate(prompts, long), oracle.generate(prompts, long)
    same(ours, theirs)
    assert [len(result.tokens) for result in ours] == [4, 40, 40]


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_max_tokens_and_the_end_of_the_cache_are_exact(
    engine: Engine, oracle: Engine, device: HostDevice, length: int
) -> None:
    prompt = list(range(700, 700 + POSITIONS - 2))
    launches = device.launches
    for limit in (length, 99):
        params = replace(GREEDY, max_tokens=limit)
        same([engine.generate(prompt, params)], [oracle.generate(prompt, params)])
    # Known ends are not overrun: the first token is the prefill's, and each other one took a single step.
    assert device.launches - launches == (min(length, 3) - 1) + 2


def test_a_stop_string_ends_the_answer_where_the_plain_loop_ends_it(engine: Engine, oracle: Engine) -> None:
    text = oracle.generate(PROMPTS[1], GREEDY).text
    params = replace(GREEDY, stop=(text[len(text) // 2 :][:4],))
    ours, theirs = engine.generate(PROMPTS[1], params), oracle.generate(PROMPTS[1], params)
    same([ours], [theirs])
    assert ours.finish_reason == "stop"


def test_a_chat_prefills_only_its_new_turn(engine: Engine, oracle: Engine) -> None:
    replies = []
    for running in (engine, oracle):
        first = list(running.stream_reply([1, 420, 6316, 28781], max_tokens=6, ignore_eos=True))
        said = [1, 420, 6316, 28781] + [chunk.token for chunk in first if chunk.token is not None]
        stream = running.stream_reply([*said[:-1], 315, 28747], max_tokens=6, ignore_eos=True)
        second = [chunk.token for chunk in stream]
        replies.append(([chunk.token for chunk in first], second, stream.result.timings.reused_tokens))
    assert replies[0] == replies[1]
    assert replies[0][2] == 9


def test_a_chat_goes_on_after_a_reply_that_was_stopped_early(engine: Engine, oracle: Engine) -> None:
    answers = []
    for running in (engine, oracle):
        stream = running.stream_reply(PROMPTS[1], max_tokens=20, ignore_eos=True)
        read = [next(stream).token for _ in range(4)]  # on a GPU more steps are under way
        stream.close()
        said = [*PROMPTS[1], *(token for token in read if token is not None)]
        again = running.stream_reply([*said, 315, 28747], max_tokens=6, ignore_eos=True)
        answers.append((read, [chunk.token for chunk in again], again.result.timings.reused_tokens))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("at_wait", [1, 2, 5])
def test_ctrl_c_keeps_the_text_so_far(
    engine: Engine, device: HostDevice, monkeypatch: pytest.MonkeyPatch, at_wait: int
) -> None:
    free = engine.generate(PROMPTS[:2], GREEDY)
    waits, wait = [0], device.wait

    def interrupted_wait(event: int) -> None:
        waits[0] += 1
        if waits[0] == at_wait + 2:  # the two prefills wait as well
            signal.raise_signal(signal.SIGINT)
        wait(event)

    monkeypatch.setattr(device, "wait", interrupted_wait)
    with pytest.raises(GenerationInterrupted) as caught:
        engine.generate(PROMPTS[:2], GREEDY)
    monkeypatch.undo()
    for result, whole in zip(caught.value.results, free, strict=True):
        assert result.finish_reason == "interrupted"
        assert result.tokens == whole.tokens[:at_wait]
    same(engine.generate(PROMPTS[:2], GREEDY), free)


def test_timings_keep_their_meaning(engine: Engine) -> None:
    before = engine.backend.model_seconds
    timings = engine.generate(PROMPTS[0], GREEDY).timings
    assert len(timings.itl_s) == len(timings.host_s) == 11
    assert all(0 < host < step for host, step in zip(timings.host_s, timings.itl_s, strict=True))
    assert timings.model_s == pytest.approx(engine.backend.model_seconds - before)


def test_the_backend_says_what_it_is(engine: Engine) -> None:
    assert isinstance(engine.backend, TensorRTBackend)
    assert engine.backend.name == "tensorrt-rtx"
    assert engine.backend.provider == f"TensorRT for RTX {VERSION} on HostDevice"
    assert engine.backend.note is None


def test_served_requests_answer_as_alone_drawn_on_the_device_or_on_the_host(engine: Engine) -> None:
    settings = [GREEDY, DRAWN, replace(DRAWN, seed=6), replace(GREEDY, repetition_penalty=1.3), DRAWN, GREEDY]
    prompts = [*PROMPTS, PROMPTS[3], PROMPTS[0]]
    alone = [engine.generate(prompt, params) for prompt, params in zip(prompts, settings, strict=True)]
    with ServingLoop(engine, prefill_chunk=8) as loop:
        handles = [loop.submit(prompt, params) for prompt, params in zip(prompts, settings, strict=True)]
        same([handle.result(60) for handle in handles], alone)
    assert len({result.tokens for result in alone[:4]}) == 4


def test_a_serving_loop_launches_steps_ahead_and_drops_none_that_it_needs(
    engine: Engine, oracle: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that join while steps are under way, leave between them, and one that must see logits on the host."""
    lengths = [12, 3, 20, 7, 16, 9]
    prompts = [PROMPTS[number % len(PROMPTS)] for number in range(len(lengths))]
    settings = [replace(GREEDY, max_tokens=length) for length in lengths]
    settings[1] = replace(settings[1], logprobs=2)
    alone = [oracle.generate(prompt, params) for prompt, params in zip(prompts, settings, strict=True)]
    launched = []
    backend = engine.backend
    assert isinstance(backend, TensorRTBackend)
    launch = backend.launch
    monkeypatch.setattr(backend, "launch", lambda rows: (launched.append(rows), launch(rows)))
    with ServingLoop(engine, prefill_chunk=8) as loop:
        handles = [loop.submit(prompt, params) for prompt, params in zip(prompts, settings, strict=True)]
        results = [handle.result(60) for handle in handles]
    same(results, alone)
    assert len(launched) > 8

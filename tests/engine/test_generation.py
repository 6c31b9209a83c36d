"""The decode loop: rows of a batch answer as alone, text and tokens agree, and every way to end is named."""

import signal
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from starling.engine.backends.backend import Backend
from starling.engine.backends.open_backend import open_backend
from starling.engine.batching.generation_stream import GenerationStream, generate
from starling.engine.bundle.manifest import Bundle
from starling.engine.generation.results import GenerationResult
from starling.engine.generation.sampler import make_sampler
from starling.engine.generation.sampling_params import SamplingParams
from starling.engine.generation.sequence import GenerationSequence, make_sequence
from starling.engine.text.tokenizer import Tokenizer

MAX_SEQ = 64
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
PROMPTS = [(1, 420, 6316, 28781), (1, 7596, 1247, 28747, 26256, 2936, 7653, 1413), (1, 315), tuple(range(900, 930))]


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def tokenizer(bundle: Bundle) -> Tokenizer:
    return Tokenizer.load(bundle.folder, bundle.architecture.vocab_size)


@pytest.fixture(scope="module")
def backend(bundle: Bundle) -> Iterator[Backend]:
    backend = open_backend(bundle, name="onnxruntime-cpu", max_seq=MAX_SEQ, max_batch=len(PROMPTS), threads=1)
    yield backend
    backend.close()


def sequence(
    tokenizer: Tokenizer, prompt: tuple[int, ...], params: SamplingParams = GREEDY, eos: tuple[int, ...] = ()
) -> GenerationSequence:
    return make_sequence(prompt, params, tokenizer, eos=eos, vocab_size=32002, max_seq=MAX_SEQ)


def run(backend: Backend, *sequences: GenerationSequence) -> list[GenerationResult]:
    for _ in generate(backend, list(sequences)):
        pass
    return [row.result() for row in sequences]


def test_greedy_equals_prefilling_the_whole_text_for_each_token(backend: Backend, tokenizer: Tokenizer) -> None:
    [result] = run(backend, sequence(tokenizer, PROMPTS[0]))
    ids = list(PROMPTS[0])
    for _ in range(GREEDY.max_tokens):
        ids += backend.prefill(0, np.array(ids), 0).tokens()
    assert result.tokens == tuple(ids[len(PROMPTS[0]) :])
    assert len(set(result.tokens)) > 3, "a model that repeats itself would prove nothing"


@pytest.mark.parametrize("lengths", [(12, 12, 12, 12), (2, 12, 5, 9), (12, 9, 5, 2), (5, 12, 1, 1)])
def test_rows_answer_as_alone(backend: Backend, tokenizer: Tokenizer, lengths: tuple[int, ...]) -> None:
    def rows() -> list[GenerationSequence]:
        settings = [SamplingParams(max_tokens=length, ignore_eos=True) for length in lengths]
        return [sequence(tokenizer, prompt, params) for prompt, params in zip(PROMPTS, settings, strict=True)]

    alone = [run(backend, row)[0] for row in rows()]
    together = run(backend, *rows())
    assert [result.tokens for result in together] == [result.tokens for result in alone]
    assert [result.text for result in together] == [result.text for result in alone]
    assert [len(result.tokens) for result in together] == list(lengths)


def test_sampled_rows_answer_as_alone(backend: Backend, tokenizer: Tokenizer) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.8, top_p=0.9, seed=7)
    alone = [run(backend, sequence(tokenizer, prompt, params))[0].tokens for prompt in PROMPTS]
    together = run(backend, *(sequence(tokenizer, prompt, params) for prompt in PROMPTS))
    assert [result.tokens for result in together] == alone


def test_a_row_that_filled_its_cache_leaves_the_others_right(backend: Backend, tokenizer: Tokenizer) -> None:
    long = SamplingParams(max_tokens=1000, ignore_eos=True)
    full = tuple(range(700, 700 + MAX_SEQ - 3))
    [alone] = run(backend, sequence(tokenizer, PROMPTS[0]))
    first, second = run(backend, sequence(tokenizer, full, long), sequence(tokenizer, PROMPTS[0]))
    # The last token needs no position: nothing is decoded after it.
    assert (first.finish_reason, len(first.tokens)) == ("length", 4)
    assert second.tokens == alone.tokens


def test_what_the_cache_is_said_to_hold_is_in_it(backend: Backend, tokenizer: Tokenizer) -> None:
    short, long = sequence(tokenizer, PROMPTS[1], SamplingParams(max_tokens=3, ignore_eos=True)), None
    long = sequence(tokenizer, PROMPTS[0])
    run(backend, short, long)
    for row, done in enumerate((short, long)):
        held = done.cached_ids()
        assert held == done.prompt + done.result().tokens[:-1]
        behind_cache = backend.prefill(row, np.array([77]), len(held)).logits()[0].copy()
        fresh = backend.prefill(row, np.array([*held, 77]), 0).logits()[0]
        np.testing.assert_allclose(behind_cache, fresh, rtol=1e-4, atol=1e-4)


def test_chunks_joined_are_the_text(backend: Backend, tokenizer: Tokenizer) -> None:
    row = sequence(tokenizer, PROMPTS[1])
    chunks = [chunk for _, chunk in generate(backend, [row])]
    result = row.result()
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert tuple(chunk.token for chunk in chunks) == result.tokens
    assert [chunk.finish_reason for chunk in chunks] == [None] * 11 + ["length"]
    assert chunks[-1].timings == result.timings
    whole = tokenizer.decode([*PROMPTS[1], *result.tokens])
    assert whole == tokenizer.decode(PROMPTS[1]) + result.text


def test_end_tokens_end_the_answer_and_give_no_text(backend: Backend, tokenizer: Tokenizer) -> None:
    [free] = run(backend, sequence(tokenizer, PROMPTS[0]))
    stop = free.tokens[4]
    at = free.tokens.index(stop)
    params = SamplingParams(max_tokens=12)
    for ended in (
        sequence(tokenizer, PROMPTS[0], params, eos=(stop,)),
        sequence(tokenizer, PROMPTS[0], SamplingParams(max_tokens=12, stop_token_ids=(stop,), ignore_eos=True)),
    ):
        [result] = run(backend, ended)
        assert (result.tokens, result.finish_reason) == (free.tokens[: at + 1], "stop")
        assert free.text.startswith(result.text)
    ignoring = SamplingParams(max_tokens=12, ignore_eos=True)
    assert run(backend, sequence(tokenizer, PROMPTS[0], ignoring, eos=(stop,)))[0].tokens == free.tokens


def test_stop_string_across_a_token_border_cuts_the_text(backend: Backend, tokenizer: Tokenizer) -> None:
    row = sequence(tokenizer, PROMPTS[0])
    texts = [chunk.text for _, chunk in generate(backend, [row])]
    border = next(i for i in range(2, len(texts)) if texts[i - 1] and texts[i])
    stop = texts[border - 1][-1] + texts[border][0]
    whole = "".join(texts)
    params = SamplingParams(max_tokens=12, ignore_eos=True, stop=(stop,))
    [result] = run(backend, sequence(tokenizer, PROMPTS[0], params))
    assert result.finish_reason == "stop"
    assert result.text == whole[: whole.index(stop)]
    assert len(result.tokens) < 12


def test_text_held_for_a_stop_string_comes_at_the_end(backend: Backend, tokenizer: Tokenizer) -> None:
    [free] = run(backend, sequence(tokenizer, PROMPTS[0]))
    never = SamplingParams(max_tokens=12, ignore_eos=True, stop=(free.text[-6:] + "\0",))
    [result] = run(backend, sequence(tokenizer, PROMPTS[0], never))
    assert (result.text, result.finish_reason) == (free.text, "length")


def test_logprobs_come_with_every_token(backend: Backend, tokenizer: Tokenizer) -> None:
    params = SamplingParams(max_tokens=5, ignore_eos=True, logprobs=2)
    [result] = run(backend, sequence(tokenizer, PROMPTS[0], params))
    assert result.logprobs is not None
    assert [entry.token for entry in result.logprobs] == list(result.tokens)
    assert all(entry.top[0] == (entry.token, entry.logprob) and len(entry.top) == 2 for entry in result.logprobs)
    assert run(backend, sequence(tokenizer, PROMPTS[0]))[0].logprobs is None


def interrupting(row: GenerationSequence, *, at_token: int) -> GenerationSequence:
    """The sequence, with a real SIGINT arriving while it chooses that token."""
    choose = make_sampler(SamplingParams())

    def choose_interrupted(logits: np.ndarray) -> int:
        if len(row.tokens) == at_token:
            signal.raise_signal(signal.SIGINT)
        return choose(logits)

    row.sample = choose_interrupted
    return row


@pytest.mark.parametrize("at_token", [0, 1, 5])
def test_ctrl_c_keeps_the_text_so_far(backend: Backend, tokenizer: Tokenizer, at_token: int) -> None:
    [free] = run(backend, sequence(tokenizer, PROMPTS[0]))
    row = interrupting(sequence(tokenizer, PROMPTS[0]), at_token=at_token)
    stream = GenerationStream(generate(backend, [row]), [row])
    chunks = list(stream)
    assert stream.result.tokens == free.tokens[:at_token]
    assert stream.result.finish_reason == chunks[-1].finish_reason == "interrupted"
    assert "".join(chunk.text for chunk in chunks) == stream.result.text
    assert free.text.startswith(stream.result.text)
    assert chunks[-1].token is None
    assert chunks[-1].timings is not None
    assert chunks[-1].timings.new_tokens == at_token


def test_ctrl_c_ends_every_row_of_a_batch(backend: Backend, tokenizer: Tokenizer) -> None:
    short = sequence(tokenizer, PROMPTS[0], SamplingParams(max_tokens=2, ignore_eos=True))
    rows = [short, interrupting(sequence(tokenizer, PROMPTS[1]), at_token=4), sequence(tokenizer, PROMPTS[2])]
    last = {id(request.sequence): chunk for request, chunk in generate(backend, rows)}
    assert [last[id(row)].finish_reason for row in rows] == ["length", "interrupted", "interrupted"]


def test_ctrl_c_hands_out_text_that_was_held_back(backend: Backend, tokenizer: Tokenizer) -> None:
    [free] = run(backend, sequence(tokenizer, PROMPTS[0]))
    held = SamplingParams(max_tokens=12, ignore_eos=True, stop=(free.text + "\0",))
    row = interrupting(sequence(tokenizer, PROMPTS[0], held), at_token=5)
    chunks = [chunk for _, chunk in generate(backend, [row])]
    assert [chunk.text for chunk in chunks[:-1]] == [""] * 5
    assert chunks[-1].text == row.result().text
    assert chunks[-1].text
    assert free.text.startswith(chunks[-1].text)


def test_closing_a_stream_ends_it_where_it_is(backend: Backend, tokenizer: Tokenizer) -> None:
    row = sequence(tokenizer, PROMPTS[0])
    stream = GenerationStream(generate(backend, [row]), [row])
    read = [next(stream) for _ in range(3)]
    stream.close()
    assert stream.result.finish_reason == "interrupted"
    assert stream.result.tokens == tuple(chunk.token for chunk in read)
    assert list(stream) == []


def test_timings_add_up(backend: Backend, tokenizer: Tokenizer) -> None:
    model_before = backend.model_seconds
    [result] = run(backend, sequence(tokenizer, PROMPTS[0]))
    timings = result.timings
    assert (timings.prompt_tokens, timings.new_tokens, timings.reused_tokens) == (4, 12, 0)
    assert len(timings.itl_s) == 11
    assert 0 < timings.prefill_model_s < timings.ttft_s
    assert len(timings.host_s) == 11
    assert all(0 < host < step for host, step in zip(timings.host_s, timings.itl_s, strict=True))
    assert timings.model_s == pytest.approx(backend.model_seconds - model_before)
    assert timings.tokens_per_second == pytest.approx(1e3 / timings.tpot_ms)
    assert timings.host_s_per_token == np.median(timings.host_s)


def test_host_work_per_token_allocates_no_more_than_its_records(backend: Backend, tokenizer: Tokenizer) -> None:
    row = sequence(tokenizer, (1,), SamplingParams(max_tokens=60, ignore_eos=True))
    chunks = generate(backend, [row])
    for _ in range(5):
        next(chunks)
    tracemalloc.start()
    for _ in chunks:
        pass
    grown, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # One float32 row of logits is 128,008 bytes; 55 tokens with their texts and times take a few hundred bytes each.
    assert grown < 55 * 400
    assert peak < 40_000

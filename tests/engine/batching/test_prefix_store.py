"""Known prefixes: what is copied is what a prefill would have written, within bounds, and for those alone who may."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from starling.engine import Engine, SamplingParams
from starling.engine.backends.backend import PREFIX_BLOCK
from starling.engine.backends.onnxruntime.row_copies import HostRowCopies
from starling.engine.batching.prefix_store import BLOCK_OVERHEAD, PrefixStore, block_bytes
from starling.engine.batching.request import Request
from starling.engine.errors import PromptError, QueueFullError, SamplingError, UserError
from starling.engine.generation.results import GenerationResult
from starling.engine.generation.sequence import GenerationSequence
from starling.engine.serving_loop import ServingLoop

ROWS, POSITIONS = 3, 512
Tokens = tuple[int, ...]


class Rows:
    """A cache in which a position's number says which tokens led to it, and what a prefill into it would write."""

    def __init__(self) -> None:
        self.cache = np.zeros((2, ROWS, 2, POSITIONS, 3), np.float32)

    def prefill(self, row: int, tokens: Tokens, start: int) -> None:
        for position in range(start, len(tokens)):
            self.cache[:, row, :, position] = hash(tokens[: position + 1]) % 2**20

    def holds(self, row: int, tokens: Tokens) -> bool:
        wanted = [hash(tokens[: position + 1]) % 2**20 for position in range(len(tokens))]
        return bool((self.cache[:, row, :, : len(tokens)] == np.array(wanted)[:, None]).all())


def request(engine: Engine, prompt: Tokens, row: int, salt: str = "") -> Request:
    sequence: GenerationSequence = engine.prepare(prompt, SamplingParams())
    return Request(sequence, row=row, salt=salt)


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Iterator[Engine]:
    with Engine(tiny_bundle, backend="onnxruntime-cpu", max_seq=POSITIONS, max_batch=ROWS, threads=1) as engine:
        yield engine


def drawn_prompt(dice: random.Random) -> Tokens:
    """Few beginnings with few continuations, so that prompts have prefixes in common and part within blocks too."""
    parts = [(token,) * dice.choice([20, 32, 64]) for token in dice.choices(range(3), k=dice.randrange(1, 6))]
    return tuple(token for part in parts for token in part) + tuple(dice.choices(range(3), k=dice.randrange(1, 40)))


@pytest.mark.parametrize("blocks", [0, 1, 3, 7, 40])
def test_a_row_holds_what_a_prefill_would_have_written(engine: Engine, blocks: int) -> None:
    rows, dice = Rows(), random.Random(blocks)
    store, hits = PrefixStore(HostRowCopies(rows.cache, blocks), blocks), 0
    for _ in range(600):
        prompt = drawn_prompt(dice)[: POSITIONS - 1]
        asked = request(engine, prompt, dice.randrange(ROWS))
        known = store.load(asked)
        assert known <= len(prompt) - 2 or not known
        rows.prefill(asked.row, prompt, known)
        assert rows.holds(asked.row, prompt)
        store.save(prompt, asked)
        assert store.used <= blocks
        hits += known
    assert (hits > 0) == (blocks > 0)


def test_the_least_recently_used_block_goes_first_and_never_one_before_others(engine: Engine) -> None:
    rows = Rows()
    store = PrefixStore(HostRowCopies(rows.cache, 6), 6)

    def keep(prompt: Tokens) -> None:
        asked = request(engine, prompt, 0)
        rows.prefill(0, prompt, store.load(asked))
        store.save(prompt, asked)

    def known(prompt: Tokens) -> int:
        return store.load(request(engine, prompt, 1)) // PREFIX_BLOCK

    first, second = (1,) * 128 + (9, 9), (2,) * 64 + (9, 9)
    keep(first)
    keep(second)
    assert (known(first), known(second)) == (4, 2)  # the first was used before the second
    keep((3,) * 32 + (9, 9))
    assert (known(first), known(second)) == (3, 2)  # its end went, its beginning stays
    keep((4,) * 500)  # longer than all memory: its beginning is kept
    assert known((4,) * 500) == 6
    assert (known(first), known(second)) == (0, 0)


def test_memory_is_bounded_under_thousands_of_prompts_and_salts(engine: Engine) -> None:
    rows, dice = Rows(), random.Random(1)
    store = PrefixStore(HostRowCopies(rows.cache, 20), 20)
    for number in range(5000):
        prompt = tuple(dice.choices(range(1000), k=80))
        store.save(prompt, request(engine, prompt, 0, salt=str(number)))
    assert store.used == 20
    assert len(store._roots) <= 20


def test_prefixes_are_shared_within_a_salt_alone(engine: Engine) -> None:
    rows = Rows()
    store = PrefixStore(HostRowCopies(rows.cache, 20), 20)
    prompt = (5,) * 100
    store.save(prompt, request(engine, prompt, 0, salt="a"))
    assert [store.load(request(engine, prompt, 1, salt=salt)) for salt in ("", "b", "a")] == [0, 0, 96]


def test_a_store_takes_as_many_blocks_as_its_bytes_hold(engine: Engine) -> None:
    one = block_bytes(engine.backend) + BLOCK_OVERHEAD
    for size, blocks in ((0, 0), (one - 1, 0), (one, 1), (10 * one + 5, 10)):
        store = PrefixStore.of(engine.backend, size)
        assert store is not None
        assert store.capacity == blocks


# Through the loop, on a model.

SHARED = [(7 * token + 3) % 30000 for token in range(150)]


def some(tokens: int, **settings: float) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, ignore_eos=True, **settings)  # type: ignore[arg-type]


def same(ours: GenerationResult, wanted: GenerationResult) -> bool:
    return (ours.tokens, ours.text, ours.finish_reason) == (wanted.tokens, wanted.text, wanted.finish_reason)


def test_answers_are_the_same_and_known_tokens_are_counted(engine: Engine) -> None:
    prompts = [SHARED[:length] + [100 + length] * own for length in (150, 128, 97, 64, 31) for own in (1, 2, 30)]
    alone = [engine.generate(prompt, some(9)) for prompt in prompts]
    with ServingLoop(engine) as loop:
        results = [loop.submit(prompt, some(9)).result(60) for prompt in prompts]
        again = [handle.result(60) for handle in [loop.submit(prompt, some(9)) for prompt in prompts]]
        stats = loop.stats()
    assert all(same(ours, wanted) for ours, wanted in zip([*results, *again], [*alone, *alone], strict=True))
    cached = [result.timings.reused_tokens for result in results]
    assert cached[:6] == [0, 128, 128, 127, 128, 128]  # two tokens at least are prefilled
    assert stats.prefix_hits == sum(cached) + sum(result.timings.reused_tokens for result in again)
    assert stats.prefix_queries == 2 * sum(map(len, prompts))
    assert stats.prompt_tokens == stats.prefix_queries - stats.prefix_hits


def test_an_answer_is_known_too_when_the_chat_goes_on(engine: Engine) -> None:
    with ServingLoop(engine) as loop:
        first = loop.submit(SHARED[:70], some(60)).result(60)
        going_on = [*SHARED[:70], *first.tokens, 5, 6, 7]
        second = loop.submit(going_on, some(9)).result(60)
    assert second.timings.reused_tokens == 128
    assert same(second, engine.generate(going_on, some(9)))


def test_a_loop_without_a_cache_knows_nothing(engine: Engine) -> None:
    with ServingLoop(engine, prefix_cache=0) as loop:
        results = [loop.submit(SHARED, some(3)).result(60) for _ in range(2)]
        assert (loop.prefix_tokens, loop.stats().prefix_queries, loop.stats().prompt_tokens) == (0, 0, 300)
    assert results[1].timings.reused_tokens == 0
    with pytest.raises(UserError, match="prefix_cache=-1"):
        ServingLoop(engine, prefix_cache=-1)


def test_a_salt_keeps_prefixes_apart(engine: Engine) -> None:
    with ServingLoop(engine) as loop:
        cached = [
            loop.submit(SHARED, some(3), cache_salt=salt).result(60).timings.reused_tokens
            for salt in ("a", "b", "", "a")
        ]
    assert cached == [0, 0, 0, 128]


def test_requests_that_come_together_share_their_prefix(engine: Engine) -> None:
    with ServingLoop(engine) as loop:
        handles = [loop.submit([*SHARED, 100 + number, 5], some(3)) for number in range(ROWS + 2)]
        assert [handle.result(60).timings.reused_tokens for handle in handles] == [0, *[128] * (ROWS + 1)]


def test_a_scored_prompt_is_prefilled_whole(engine: Engine) -> None:
    scored = some(2, prompt_logprobs=1)
    with ServingLoop(engine) as loop:
        loop.submit(SHARED, some(2)).result(60)
        result = loop.submit(SHARED, scored).result(60)
    assert result.prompt_logprobs is not None
    assert (len(result.prompt_logprobs), result.timings.reused_tokens) == (len(SHARED), 0)


# Several answers to a prompt.


@pytest.mark.parametrize("cache", [0, 2**26])
@pytest.mark.parametrize("logprobs", [None, 2])
def test_choices_are_those_of_requests_with_their_seeds_and_the_prompt_is_prefilled_once(
    engine: Engine, cache: int, logprobs: int | None
) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=1.0, seed=40, logprobs=logprobs)
    with ServingLoop(engine, prefix_cache=cache) as loop:
        choices = [handle.result(60) for handle in loop.submit_choices(SHARED, params, ROWS)]
        assert loop.stats().prompt_tokens == len(SHARED)
    with ServingLoop(engine, prefix_cache=0) as loop:
        alone = [loop.submit(SHARED, params.of_choice(index)).result(60) for index in range(ROWS)]
    assert len({choice.tokens for choice in choices}) == ROWS
    assert all(same(ours, wanted) for ours, wanted in zip(choices, alone, strict=True))
    assert [choice.logprobs for choice in choices] == [one.logprobs for one in alone]
    assert [choice.timings.reused_tokens for choice in choices] == [0, *[len(SHARED)] * (ROWS - 1)]


def test_a_script_gets_the_same_choices(engine: Engine) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=1.0, seed=40)
    choices = engine.generate_choices(SHARED, params, n=ROWS)
    alone = [engine.generate(SHARED, params, seed=40 + index) for index in range(ROWS)]
    assert all(same(ours, wanted) for ours, wanted in zip(choices, alone, strict=True))
    assert [choice.timings.prefilled_tokens for choice in choices] == [len(SHARED), 0, 0]
    assert same(engine.generate_choices("Once", some(5), n=1)[0], engine.generate("Once", some(5)))
    with pytest.raises(PromptError, match=f"{ROWS + 1} answers, but the KV cache has {ROWS} row"):
        engine.generate_choices(SHARED, params, n=ROWS + 1)
    with pytest.raises(SamplingError, match="n is 0"):
        engine.generate_choices(SHARED, params, n=0)


def test_greedy_choices_are_all_the_same_and_may_be_more_than_rows(engine: Engine) -> None:
    wanted = engine.generate(SHARED, some(10))
    with ServingLoop(engine) as loop:
        choices = [handle.result(60) for handle in loop.submit_choices(SHARED, some(10), 3 * ROWS)]
        # Those that come when no other has a row any more prefill what whole blocks and the last two tokens leave.
        assert len(SHARED) <= loop.stats().prompt_tokens <= len(SHARED) + 3 * (len(SHARED) - 128)
        assert (loop.stats().submitted, loop.stats().ended) == (3 * ROWS, {"length": 3 * ROWS})
    assert all(same(choice, wanted) for choice in choices)


def test_choices_have_the_prompts_scores_and_may_want_nothing_else(engine: Engine) -> None:
    for tokens in (0, 3):
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, prompt_logprobs=1)
        with ServingLoop(engine) as loop:
            results = [handle.result(60) for handle in loop.submit_choices(SHARED, params, 2)]
        assert results[0].prompt_logprobs == results[1].prompt_logprobs
        assert results[1].prompt_logprobs is not None
        assert [len(result.tokens) for result in results] == [tokens, tokens]


def test_one_cancelled_before_the_others_costs_them_nothing(engine: Engine) -> None:
    wanted = engine.generate(SHARED, some(10))
    with ServingLoop(engine) as loop:
        busy = [loop.submit([5, 6, 7], some(40)) for _ in range(ROWS)]
        handles = loop.submit_choices(SHARED, some(10), 3)
        handles[0].cancel()
        results = [handle.result(60) for handle in handles]
        for handle in busy:
            handle.result(60)
        assert loop.stats().ended == {"length": ROWS + 2, "cancelled": 1}
    assert results[0].finish_reason == "cancelled"
    assert all(same(result, wanted) for result in results[1:])


def test_a_queue_takes_all_choices_or_none(engine: Engine) -> None:
    with ServingLoop(engine, queue_limit=1) as loop:
        with pytest.raises(QueueFullError):
            loop.submit_choices(SHARED, some(2), ROWS + 2)
        assert (loop.stats().refused, loop.stats().submitted) == (ROWS + 2, 0)
        assert len(loop.submit_choices(SHARED, some(2), ROWS + 1)) == ROWS + 1
        with pytest.raises(UserError, match="n is 0"):
            loop.submit_choices(SHARED, some(2), 0)


@pytest.mark.slow
def test_a_real_model_gives_the_same_bits_with_our_kernels(demo_int8_bundle: Path) -> None:
    """100 prompts: shared beginnings of all lengths, the same prompts again, and answers that become prompts."""
    dice = random.Random(5)
    with Engine(demo_int8_bundle, backend="onnxruntime-cpu", max_seq=320, max_batch=4, threads=2) as engine:
        base = engine.encode("The library of the harbour town keeps records of ships and prices since 1740. " * 20)[
            :220
        ]
        prompts = [
            base[: dice.choice([33, 64, 65, 96, 97, dice.randrange(40, 220)])]
            + dice.choices(range(1000, 40000), k=dice.choice([0, 1, 2, dice.randrange(30)]))
            for _ in range(40)
        ]
        params = SamplingParams(max_tokens=5, ignore_eos=True, logprobs=1)

        def answers(cache: int, together: int) -> list[GenerationResult]:
            with ServingLoop(engine, prefix_cache=cache) as loop:
                found: list[GenerationResult] = []
                for first in range(0, len(prompts), together):
                    handles = [loop.submit(prompt, params) for prompt in prompts[first : first + together]]
                    found += [handle.result(600) for handle in handles]
                later = [[*prompt, *one.tokens, 9, 8] for prompt, one in zip(prompts[:10], found, strict=False)]
                found += [
                    loop.submit(prompt, params).result(600) for prompt in [*later, *prompts[:30], *prompts[10:30]]
                ]
                assert (loop.stats().prefix_hits > 5000) == (cache > 0)
                return found

        wanted = answers(0, 4)
        assert len(wanted) == 100
        for together in (1, 4):
            found = answers(2**26, together)
            assert [one.tokens for one in found] == [one.tokens for one in wanted]
            if engine.backend.kernels is not None:
                assert [one.logprobs for one in found] == [one.logprobs for one in wanted]

"""Speculation: the very tokens, text and reasons as without it, in fewer runs of the model; and when it is refused."""

import json
import shutil
import signal
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from starling.engine import Engine
from starling.engine.backends.backend import MOST_VERIFIED, RowPart
from starling.engine.backends.onnxruntime.onnxruntime_backend import OrtBackend
from starling.engine.backends.open_backend import open_backend
from starling.engine.batching.speculation import write_drafts
from starling.engine.batching.step_costs import ExtraCost, StepCosts
from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import BackendError, UserError
from starling.engine.generation.results import GenerationResult
from starling.engine.generation.sampler import make_sampler
from starling.engine.generation.sampling_params import SamplingParams
from starling.engine.names import LOGITS_TO_KEEP
from starling.engine.serving_loop import ServingLoop

MAX_SEQ = 320
LIST = """Copy this list, sorted as it is.

Bring the tent poles back to Harriet
Ask the ferry company about bicycles on the early boat
Fill the two blue gas bottles
Order the batteries for the weather station
"""
CODE = """Rename the variable `total` to `balance` everywhere and give me the whole function again.

```python
def settle(account, payments):
    total = account.opening
    for payment in payments:
        total += payment.amount
    account.closing = total
    return total
```
"""
STORY = "Write a short story about a clockmaker who finds a clock that runs backwards."
#: Drawn near enough to the likeliest that some drafts are right and some are not.
DRAWN = SamplingParams(max_tokens=40, temperature=0.6, top_p=0.9, seed=7)


@pytest.fixture(scope="module", autouse=True)
def assumed_costs() -> Iterator[None]:
    """What verifying costs stays what is assumed at first: how busy this machine is may not decide what is drafted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExtraCost, "observe", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def engine(demo_bundle: Path) -> Iterator[Engine]:
    with Engine(demo_bundle, backend="onnxruntime-cpu", max_seq=MAX_SEQ, max_batch=2, threads=1) as engine:
        yield engine


def run(engine: Engine, prompt: str, params: SamplingParams, speculation: str | None) -> GenerationResult:
    ids = engine.apply_chat_template([{"role": "user", "content": prompt}])
    engine.speculation = speculation
    return engine.generate(ids, params, reply=True)


def both(engine: Engine, prompt: str, params: SamplingParams) -> GenerationResult:
    """The result with speculation, which is the one without it but for the times."""
    plain = run(engine, prompt, params, None)
    drafted = run(engine, prompt, params, "prompt-lookup")
    assert drafted.tokens == plain.tokens
    assert (drafted.text, drafted.finish_reason) == (plain.text, plain.finish_reason)
    assert plain.timings.drafted_tokens == plain.timings.accepted_tokens == 0
    return drafted


@pytest.fixture(scope="module")
def copied(engine: Engine) -> GenerationResult:
    """The list said again, without speculation: what every way to end it is compared with."""
    return run(engine, LIST, SamplingParams(max_tokens=40), None)


@pytest.mark.parametrize(("prompt", "least"), [(LIST, 20), (CODE, 10), (STORY, 0)], ids=["list", "code", "story"])
def test_greedy_tokens_are_the_same(engine: Engine, prompt: str, least: int) -> None:
    timings = both(engine, prompt, SamplingParams(max_tokens=48)).timings
    assert least <= timings.accepted_tokens <= timings.drafted_tokens


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_drawn_tokens_are_the_same_with_the_same_seed(engine: Engine, seed: int) -> None:
    timings = both(engine, LIST, replace(DRAWN, seed=seed)).timings
    assert 0 < timings.accepted_tokens < timings.drafted_tokens


def test_penalties_see_the_same_history(engine: Engine) -> None:
    assert both(engine, LIST, replace(DRAWN, repetition_penalty=1.05)).timings.drafted_tokens > 0
    assert both(engine, LIST, SamplingParams(max_tokens=40, repetition_penalty=1.1)).timings.drafted_tokens > 0
    counted = {"presence_penalty": 0.2, "frequency_penalty": 0.1, "min_tokens": 38, "logit_bias": {30: 2}}
    assert both(engine, LIST, replace(DRAWN, **counted)).timings.accepted_tokens > 0
    assert (
        both(engine, LIST, SamplingParams(max_tokens=40, bad_words=(" boat", "blue gas"))).timings.accepted_tokens > 0
    )


@pytest.mark.parametrize("params", [SamplingParams(max_tokens=32, logprobs=2), replace(DRAWN, logprobs=2)])
def test_logprobs_come_with_every_token(engine: Engine, params: SamplingParams) -> None:
    plain, drafted = (run(engine, LIST, params, how).logprobs for how in (None, "prompt-lookup"))
    assert plain is not None
    assert drafted is not None
    assert [entry.token for entry in drafted] == [entry.token for entry in plain]
    for ours, wanted in zip(drafted, plain, strict=True):
        assert ours.logprob == pytest.approx(wanted.logprob, abs=1e-3)
        assert [token for token, _ in ours.top] == [token for token, _ in wanted.top]


def test_max_tokens_ends_the_answer_inside_a_draft(engine: Engine, copied: GenerationResult) -> None:
    for most in range(1, 24):
        result = run(engine, LIST, SamplingParams(max_tokens=most), "prompt-lookup")
        assert (result.tokens, result.finish_reason) == (copied.tokens[:most], "length")
        assert len(result.timings.itl_s) == len(result.timings.host_s) == most - 1


def test_a_stop_token_ends_the_answer_inside_a_draft(engine: Engine, copied: GenerationResult) -> None:
    for at in range(12, 20):
        result = both(engine, LIST, SamplingParams(max_tokens=40, stop_token_ids=(copied.tokens[at],)))
        assert result.finish_reason == "stop"
        assert result.tokens == copied.tokens[: copied.tokens.index(copied.tokens[at]) + 1]


def test_a_stop_string_across_tokens_cuts_the_text_wherever_a_draft_ends(
    engine: Engine, copied: GenerationResult
) -> None:
    pieces = [engine.tokenizer.decode([token]) for token in copied.tokens]
    for at in range(12, 24):
        stop = pieces[at][-2:] + pieces[at + 1][:3]
        result = run(engine, LIST, SamplingParams(max_tokens=40, stop=(stop,)), "prompt-lookup")
        assert (result.text, result.finish_reason) == (copied.text[: copied.text.index(stop)], "stop")
        assert result.tokens == copied.tokens[: len(result.tokens)]


def test_the_end_of_the_cache_ends_the_answer(demo_bundle: Path, engine: Engine, copied: GenerationResult) -> None:
    prompt = list(copied.prompt_tokens)
    for room in (13, 16, 18):
        with Engine(
            demo_bundle, max_seq=len(prompt) + room, threads=1, backend="onnxruntime-cpu", speculation="prompt-lookup"
        ) as small:
            result = small.generate(prompt, max_tokens=40, reply=True)
        # The last token needs no position.
        assert (result.tokens, result.finish_reason) == (copied.tokens[: room + 1], "length")


def test_a_chat_answers_the_same_and_reuses_as_much(engine: Engine) -> None:
    turns = ("Say this again, word for word: the lamp was lit every evening at the same hour.", "Say it once more.")
    answers = []
    for how in (None, "prompt-lookup"):
        engine.speculation = how
        chat = engine.chat()
        answers.append([chat.send(turn, max_tokens=32) for turn in turns])
    plain, drafted = answers
    assert [answer.tokens for answer in drafted] == [answer.tokens for answer in plain]
    assert drafted[1].timings.reused_tokens == plain[1].timings.reused_tokens > 24
    assert drafted[1].timings.accepted_tokens > 0


@pytest.mark.parametrize("at_token", [3, 14, 17])
def test_ctrl_c_inside_a_draft_keeps_the_text_so_far(engine: Engine, copied: GenerationResult, at_token: int) -> None:
    engine.speculation = "prompt-lookup"
    stream = engine.stream_reply(list(copied.prompt_tokens), max_tokens=40)
    [sequence] = stream._sequences
    choose = make_sampler(SamplingParams())

    def choose_interrupted(logits: Any) -> int:
        if len(sequence.tokens) == at_token:
            signal.raise_signal(signal.SIGINT)
        return choose(logits)

    sequence.sample = choose_interrupted
    chunks = list(stream)
    assert (stream.result.tokens, stream.result.finish_reason) == (copied.tokens[:at_token], "interrupted")
    assert chunks[-1].token is None
    # What the cache is then said to hold is in it.
    again = engine.stream_reply([*copied.prompt_tokens, *copied.tokens[:at_token]], max_tokens=40 - at_token)
    rest = tuple(chunk.token for chunk in again)
    assert again.result.timings.reused_tokens == len(copied.prompt_tokens) + at_token - 1
    assert rest == copied.tokens[at_token:]


def test_a_stream_closed_inside_a_draft_ends_with_what_was_read(engine: Engine, copied: GenerationResult) -> None:
    engine.speculation = "prompt-lookup"
    for count in range(12, 18):
        stream = engine.stream_reply(list(copied.prompt_tokens), max_tokens=40)
        read = tuple(next(stream).token for _ in range(count))
        stream.close()
        assert stream.result.tokens == read == copied.tokens[:count]
        assert stream.result.finish_reason == "interrupted"


def test_times_add_up_and_tokens_verified_together_share_a_run(engine: Engine, copied: GenerationResult) -> None:
    before = engine.backend.model_seconds
    timings = run(engine, LIST, SamplingParams(max_tokens=40), "prompt-lookup").timings
    assert timings.new_tokens == len(timings.itl_s) + 1 == len(timings.host_s) + 1 == len(copied.tokens)
    assert timings.model_s == pytest.approx(engine.backend.model_seconds - before)
    runs = [step for step, host in zip(timings.itl_s, timings.host_s, strict=True) if step - host > 1e-3]
    assert len(runs) == len(timings.itl_s) - timings.accepted_tokens
    assert timings.acceptance == timings.accepted_tokens / timings.drafted_tokens


def test_the_rows_of_a_static_batch_are_verified_together(engine: Engine, copied: GenerationResult) -> None:
    other = engine.generate("The colours of the rainbow are", max_tokens=40, reply=True)
    engine.speculation = "prompt-lookup"
    prompts = [list(copied.prompt_tokens), list(other.prompt_tokens)]
    together, alone = engine.generate(prompts, max_tokens=40, reply=True)
    assert (together.tokens, alone.tokens) == (copied.tokens, other.tokens)
    if engine.backend.verified_rows > 1:
        assert together.timings.accepted_tokens > 10
    else:
        assert together.timings.drafted_tokens == 0


@pytest.fixture(scope="module")
def served(demo_bundle: Path) -> Iterator[Engine]:
    """An engine of four rows."""
    with Engine(demo_bundle, backend="onnxruntime-cpu", max_seq=MAX_SEQ, max_batch=4, threads=2) as engine:
        yield engine


class TestUnderAServingLoop:
    """Rows that join, leave and draft at different times answer as alone."""

    PROMPTS = ("Repeat this: one two three four one two three four one two three four", "Once upon a time")

    @pytest.mark.parametrize(
        "params",
        [
            SamplingParams(max_tokens=40, ignore_eos=True),
            SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.7, seed=3),
            SamplingParams(max_tokens=40, stop=("three",), logprobs=2),
        ],
        ids=["greedy", "drawn", "stop and logprobs"],
    )
    def test_the_answers_are_those_without(self, served: Engine, params: SamplingParams) -> None:
        prompts = [f"{prompt} {number}" for number in range(3) for prompt in self.PROMPTS]
        answers: list[list[GenerationResult]] = []
        for speculation in (None, "prompt-lookup"):
            served.speculation = speculation
            with ServingLoop(served, prefill_chunk=16) as loop:
                handles = [loop.submit(prompt, params) for prompt in prompts]
                answers.append([handle.result(120) for handle in handles])
        without, drafted = answers
        for one, other in zip(without, drafted, strict=True):
            assert (other.tokens, other.text, other.finish_reason) == (one.tokens, one.text, one.finish_reason)
            assert [entry.token for entry in other.logprobs or ()] == [entry.token for entry in one.logprobs or ()]
        assert all(result.timings.drafted_tokens == 0 for result in without)
        if served.backend.verified_rows > 1 and not params.stop:
            least = 0 if params.temperature else 20
            assert sum(result.timings.accepted_tokens for result in drafted) > least

    def test_what_is_cancelled_or_full_leaves_the_others_right(self, served: Engine) -> None:
        params = SamplingParams(max_tokens=MAX_SEQ, ignore_eos=True)
        served.speculation = None
        expected = served.generate(self.PROMPTS[0], params)
        served.speculation = "prompt-lookup"
        with ServingLoop(served) as loop:
            going = loop.submit(self.PROMPTS[0], params)  # to the end of its row
            gone = loop.submit(self.PROMPTS[0], params)
            next(gone)
            gone.cancel()
            assert going.result(120).tokens == expected.tokens
            assert gone.partial.tokens == expected.tokens[: len(gone.partial.tokens)]
            assert loop.stats().running == 0


def test_it_is_off_unless_asked_for(demo_bundle: Path) -> None:
    with Engine(demo_bundle, backend="onnxruntime-cpu", max_seq=8, threads=1) as engine:
        assert engine.speculation is None


def test_an_unknown_method_names_the_known_ones(engine: Engine) -> None:
    with pytest.raises(UserError, match="speculation is 'medusa': give None, or one of prompt-lookup"):
        engine.speculation = "medusa"


@pytest.fixture(scope="module")
def older_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """starling-tiny as it was exported before a graph could be told which positions get logits."""
    folder = tmp_path_factory.mktemp("older") / "tiny"
    shutil.copytree(tiny_bundle, folder)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    [kept] = [value for value in model.graph.input if value.name == LOGITS_TO_KEEP]
    model.graph.input.remove(kept)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1]), LOGITS_TO_KEEP))
    (folder / "model.onnx").write_bytes(content := model.SerializeToString())
    manifest = json.loads((folder / "bundle.json").read_text())
    manifest["kernel_graph"] = None  # there was none either
    manifest["graph"]["inputs"] = [spec for spec in manifest["graph"]["inputs"] if spec["name"] != LOGITS_TO_KEEP]
    manifest["files"]["model.onnx"] = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    (folder / "bundle.json").write_text(json.dumps(manifest))
    return folder


def test_older_bundles_run_as_ever_but_not_with_speculation(tiny_bundle: Path, older_bundle: Path) -> None:
    answers = []
    for folder in (tiny_bundle, older_bundle):
        with Engine(folder, backend="onnxruntime-cpu", max_seq=64, max_batch=2, threads=1) as engine:
            answers.append(
                [r.tokens for r in engine.generate([[1, 420, 6316], [1, 315]], max_tokens=8, ignore_eos=True)]
            )
    assert answers[0] == answers[1]
    with pytest.raises(BackendError, match="so no draft can be verified: export the model again"):
        Engine(older_bundle, backend="onnxruntime-cpu", max_seq=64, threads=1, speculation="prompt-lookup")


def test_other_dialects_name_the_one_that_can(tiny_tensorrt_bundle: Path) -> None:
    with pytest.raises(BackendError, match="no draft can be verified: export it with --dialect ort"):
        Engine(tiny_tensorrt_bundle, backend="onnxruntime-cpu", max_seq=64, threads=1, speculation="prompt-lookup")


@pytest.fixture(scope="module")
def backend(tiny_bundle: Path) -> Iterator[OrtBackend]:
    backend = open_backend(
        Bundle.open(tiny_bundle), name="onnxruntime-cpu", max_seq=64, max_batch=2, threads=1, prefill_chunk=8
    )
    assert isinstance(backend, OrtBackend)
    yield backend
    backend.close()


def ids(count: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(0).integers(3, 30_000, count)]


@pytest.mark.parametrize("count", [1, 2, 5, MOST_VERIFIED])
def test_verifying_gives_what_decoding_one_by_one_gives(backend: OrtBackend, count: int) -> None:
    tokens = ids(10 + count)
    for row in range(2):
        backend.prefill(row, np.array(tokens[:10]), 0)
    verified = backend.verify(1, tokens[10:], 10)
    choices, logits = verified.tokens(), verified.logits().copy()
    assert logits.shape == (count, backend.vocab_size)
    for at in range(count):
        decoded = backend.decode(tokens[10 + at : 11 + at], [10 + at])
        np.testing.assert_allclose(logits[at], decoded.logits()[0], rtol=1e-4, atol=1e-4)
        assert [choices[at]] == decoded.tokens()


def test_what_a_wrong_draft_wrote_is_overwritten(backend: OrtBackend) -> None:
    tokens = ids(12)
    backend.prefill(0, np.array(tokens[:10]), 0)
    wanted = backend.decode(tokens[10:11], [10]).logits().copy()
    backend.prefill(0, np.array(tokens[:10]), 0)
    backend.verify(0, [9, 8, 7, 6], 10)
    np.testing.assert_array_equal(backend.decode(tokens[10:11], [10]).logits(), wanted)


def test_nothing_is_allocated_or_bound_per_verification(backend: OrtBackend) -> None:
    draft = ids(5)

    def verify_100() -> None:
        for start in range(50):
            backend.verify(0, draft, start).tokens()

    verify_100()
    made, traced = dict(backend._verifications), []
    for _ in range(3):
        tracemalloc.start()
        verify_100()
        traced.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    assert backend._verifications == made
    assert min(traced) < 4_000


def test_verifying_outside_the_cache_or_too_much_at_once_is_refused(backend: OrtBackend) -> None:
    with pytest.raises(BackendError, match="position 64 of row 0 lies outside the KV cache"):
        backend.verify(0, ids(5), 60)
    with pytest.raises(BackendError, match=f"{MOST_VERIFIED + 1} tokens are to be verified in one step"):
        backend.verify(0, ids(MOST_VERIFIED + 1), 0)


def test_a_mixed_run_gives_what_each_row_gives(backend: OrtBackend) -> None:
    if not backend.most_mixed:
        pytest.skip("ONNX Runtime's own attention takes equally many tokens of each row")
    first, second = ids(20), ids(40)[::-1]
    for number, row in enumerate((first, second)):
        backend.prefill(number, np.array(row[:14]), 0)
    mixed = backend.mix([RowPart(0, 14, first[14:17]), RowPart(1, 14, second[14:40])], [0, 2, 28])
    chosen, together = mixed.tokens(), mixed.logits().copy()
    assert together.shape == (3, backend.vocab_size)
    for number, row in enumerate((first, second)):
        backend.prefill(number, np.array(row[:14]), 0)
    one = backend.prefill(0, np.array(first[14:15]), 14).logits().copy()
    np.testing.assert_allclose(together[:1], one, rtol=1e-4, atol=1e-4)
    three = backend.prefill(0, np.array(first[15:17]), 15).logits().copy()
    np.testing.assert_allclose(together[1:2], three, rtol=1e-4, atol=1e-4)
    whole = backend.prefill(1, np.array(second[14:40]), 14)
    np.testing.assert_allclose(together[2:], whole.logits(), rtol=1e-4, atol=1e-4)
    assert chosen == together.argmax(axis=-1).tolist()


def test_what_a_mixed_run_cannot_take_is_refused(backend: OrtBackend) -> None:
    if not backend.most_mixed:
        with pytest.raises(BackendError, match="equally many tokens of each row"):
            backend.mix([RowPart(0, 0, [5, 6])], [1])
        return
    with pytest.raises(BackendError, match="position 64 of row 0 lies outside the KV cache"):
        backend.mix([RowPart(0, 60, ids(5))], [4])
    with pytest.raises(BackendError, match="tokens are to run in one step"):
        backend.mix([RowPart(0, 0, ids(40)), RowPart(1, 0, ids(40))], [39])
    with pytest.raises(BackendError, match="0 of them with logits"):
        backend.mix([RowPart(0, 0, ids(2))], [])


class _Foretold:
    """A lookup that knows what comes."""

    def __init__(self, chances: list[float]) -> None:
        self._chances = chances

    def draft(self, most: int) -> list[int]:
        return [5] * min(most, len(self._chances))

    def chances(self, length: int) -> list[float]:
        return self._chances[:length]


class TestHowLongDraftsAre:
    """From how likely they are right, and what a quiet step and each further token take."""

    @staticmethod
    def lengths(rows: list[list[float]], drafted: float, *, most: int = 60) -> list[int]:
        costs, requests = StepCosts(), []
        costs.decoded(len(rows), 0.01, after_chunk=False)
        costs.drafts._found[2], costs.drafts._longest = drafted, 4  # what was observed would be this
        for chances in rows:
            sequence = SimpleNamespace(limit=100, tokens=[1], grammar=None)
            requests.append(SimpleNamespace(sequence=sequence, lookup=_Foretold(chances), draft=[]))
        total = write_drafts(requests, costs, most)  # type: ignore[arg-type]
        lengths = [len(request.draft) for request in requests]
        assert sum(lengths) == total
        return lengths

    SURE, LIKELY, RARE = [0.95**i for i in range(1, 17)], [0.6**i for i in range(1, 17)], [0.05] * 4

    def test_the_likelier_the_longer(self) -> None:
        sure, likely, rare = (self.lengths([chances], 0.001)[0] for chances in (self.SURE, self.LIKELY, self.RARE))
        assert sure > 10 > likely > 1 > rare == 0

    def test_the_dearer_a_token_the_fewer(self) -> None:
        found = [sum(self.lengths([self.LIKELY] * 4, cost)) for cost in (0.0002, 0.001, 0.002, 0.004)]
        assert found == sorted(found, reverse=True)
        assert found[0] > 8
        assert found[-1] == 0, "a full batch, where a token costs more than it gains"

    def test_rows_get_what_is_theirs(self) -> None:
        assert self.lengths([self.RARE, self.SURE, [], self.LIKELY], 0.0007)[::2] == [0, 0]

    def test_no_more_than_a_run_takes(self) -> None:
        assert sum(self.lengths([self.SURE] * 8, 0.0001, most=20)) == 20

    def test_without_a_quiet_step_to_compare_with_nothing_is_drafted(self) -> None:
        costs = StepCosts()
        request = SimpleNamespace(
            sequence=SimpleNamespace(limit=100, tokens=[1], grammar=None), lookup=_Foretold(self.SURE), draft=[]
        )
        assert write_drafts([request], costs, 16) == 0  # type: ignore[list-item]

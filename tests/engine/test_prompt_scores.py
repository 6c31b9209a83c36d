"""Log-probabilities of a prompt's tokens and of continuations: PyTorch's own, within bounded memory."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from families import Family, random_folder

from starling.engine.backends.backend import MOST_VERIFIED, SCORE_BYTES, most_scored
from starling.engine.backends.onnxruntime.onnxruntime_backend import OrtBackend
from starling.engine.bundle.manifest import Bundle
from starling.engine.engine import Engine
from starling.engine.errors import BackendError, PromptError, SamplingError, UserError
from starling.engine.generation.continuation_scores import scored_pair
from starling.engine.generation.results import GenerationResult
from starling.engine.generation.sampling_params import SamplingParams
from starling.engine.serving_loop import ServingLoop
from starling.export.check.torch_reference import load_reference, reference_logits
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.checkpoints.model_source import open_checkpoint
from starling.export.exporter import ExportOptions, export_bundle

MAX_SEQ = 1024
PROMPT = [1, *np.random.default_rng(3).integers(3, 30_000, 700).tolist()]
SCORED = SamplingParams(max_tokens=0, prompt_logprobs=3)
Logprobs = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Iterator[Engine]:
    with Engine(tiny_bundle, max_seq=MAX_SEQ, max_batch=2, threads=1) as engine:
        assert isinstance(engine.backend, OrtBackend)
        assert engine.backend.most_scored < len(PROMPT) / 2, "the prompt must take several runs"
        yield engine


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Checkpoint) -> torch.nn.Module:
    return load_reference(tiny_checkpoint.config, tiny_checkpoint.tensors)


def pytorch(model: torch.nn.Module, ids: list[int]) -> Logprobs:
    """[len(ids), vocab]: log-probabilities after each token, by PyTorch."""
    return torch.log_softmax(reference_logits(model, ids).double(), -1).numpy()


def check_prompt(result: GenerationResult, expected: Logprobs) -> None:
    ids, entries = result.prompt_tokens, result.prompt_logprobs
    assert entries is not None
    assert len(entries) == len(ids)
    assert entries[0] is None
    for position, entry in enumerate(entries[1:], 1):
        assert entry is not None
        assert entry.token == ids[position]
        row = expected[position - 1]
        assert entry.logprob == pytest.approx(row[entry.token], abs=1e-4)
        assert [value for _, value in entry.top] == pytest.approx(np.sort(row)[::-1][:3].tolist(), abs=1e-4)
        assert [row[token] for token, _ in entry.top] == pytest.approx([value for _, value in entry.top], abs=1e-4)
        assert dict(entry.top).get(entry.token, entry.logprob) == entry.logprob, "the same float in both places"


def test_a_prompts_log_probabilities_are_pytorchs_over_many_runs(engine: Engine, model: torch.nn.Module) -> None:
    result = engine.generate(PROMPT, SCORED)
    assert (result.text, result.tokens, result.finish_reason) == ("", (), "length")
    assert result.timings.new_tokens == 0
    assert result.timings.ttft_s > 0
    check_prompt(result, pytorch(model, PROMPT))


def test_the_answer_is_that_of_a_prompt_that_is_not_scored(engine: Engine) -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=0)
    plain = engine.generate([PROMPT, PROMPT[:9]], params)
    scored = engine.generate([PROMPT, PROMPT[:9]], replace(params, prompt_logprobs=0))
    assert [result.tokens for result in scored] == [result.tokens for result in plain]
    assert [result.prompt_logprobs for result in plain] == [None, None]
    assert [len(result.prompt_logprobs or ()) for result in scored] == [len(PROMPT), 9]


def test_a_prompt_of_one_token_has_no_log_probability(engine: Engine) -> None:
    result = engine.generate([1], SCORED)
    assert result.prompt_logprobs == (None,)


def test_a_prompt_that_fills_the_cache_is_scored_whole(tiny_bundle: Path, model: torch.nn.Module) -> None:
    with Engine(tiny_bundle, max_seq=40, threads=1) as engine:
        result = engine.generate(PROMPT[:40], SCORED)
        assert result.finish_reason == "length"
        check_prompt(result, pytorch(model, PROMPT[:40]))


def test_no_tokens_without_scores_runs_the_prompt_for_the_next_turn(engine: Engine) -> None:
    ids = PROMPT[:30]
    empty = engine.stream_reply(ids, max_tokens=0)
    assert [(chunk.text, chunk.token, chunk.finish_reason) for chunk in empty] == [("", None, "length")]
    answered = engine.stream_reply([*ids, 5, 6], max_tokens=2, ignore_eos=True)
    list(answered)
    assert answered.result.timings.reused_tokens == 30
    scored = engine.stream_reply([*ids, 5, 6], SCORED)
    list(scored)
    assert scored.result.timings.reused_tokens == 0, "what is reused has no logits"
    assert len(scored.result.prompt_logprobs or ()) == 32


def test_a_serving_loop_scores_beside_what_decodes(engine: Engine, model: torch.nn.Module) -> None:
    lengths = [(PROMPT, 0), (PROMPT[5:60], 6), (PROMPT[9:320], 0), (PROMPT[2:5], 20)]
    params = SamplingParams(ignore_eos=True, prompt_logprobs=3)
    with ServingLoop(engine, prefill_chunk=48) as loop:
        handles = [loop.submit(ids, replace(params, max_tokens=most)) for ids, most in lengths]
        results = [handle.result(60) for handle in handles]
        stats = loop.stats()
    for result, (ids, most) in zip(results, lengths, strict=True):
        check_prompt(result, pytorch(model, ids))
        assert len(result.tokens) == most
    assert stats.prompt_tokens == sum(len(ids) for ids, _ in lengths)
    assert stats.generated_tokens == 26
    assert (stats.running, stats.waiting) == (0, 0)


# Continuations.


def test_continuations_are_pytorchs_and_the_prompt_is_prefilled_once(engine: Engine, model: torch.nn.Module) -> None:
    prompt, seconds = PROMPT[:300], [7, 8, *PROMPT[400:420]]
    expected = pytorch(model, [*prompt, *seconds])
    likeliest = int(expected[299].argmax())
    continuations = [seconds, [likeliest], [11], seconds[:5]]
    counted = CountingBackend(engine)
    scores = engine.score(prompt, continuations, logprobs=2)
    assert counted.tokens == {"prefill": 300, "score": 21 + 4}
    for score, ids in zip(scores, continuations, strict=True):
        assert [entry.token for entry in score.tokens] == ids
        assert [len(entry.top) for entry in score.tokens] == [2] * len(ids)
    long, best, single, short = scores
    wanted = [expected[299 + i][token] for i, token in enumerate(seconds)]
    assert [entry.logprob for entry in long.tokens] == pytest.approx(wanted, abs=1e-4)
    assert long.logprob == pytest.approx(sum(wanted), abs=1e-3)
    assert [entry.logprob for entry in short.tokens] == pytest.approx(wanted[:5], abs=1e-4)
    assert single.logprob == pytest.approx(expected[299][11], abs=1e-4)
    assert (long.is_greedy, best.is_greedy, single.is_greedy) == (False, True, False)


def test_what_greedy_decoding_says_is_greedy_over_many_runs(engine: Engine) -> None:
    most = engine.backend.most_scored
    answer = list(engine.generate(PROMPT[:20], max_tokens=most + 40, ignore_eos=True).tokens)
    [score, changed] = engine.score(PROMPT[:20], [answer, [*answer[:-1], (answer[-1] + 1) % 30_000]])
    assert len(score.tokens) == most + 40
    assert score.is_greedy
    assert not changed.is_greedy


def test_prompts_share_what_the_row_holds(engine: Engine, model: torch.nn.Module) -> None:
    first, second = PROMPT[:200], [*PROMPT[:150], *PROMPT[300:340]]
    engine.score(first, [[5, 6, 7]])
    counted = CountingBackend(engine)
    [score] = engine.score(second, [[9, 10]])
    [again] = engine.score(second[:150], [[9, 10]])
    assert counted.tokens == {"prefill": 40 + 2, "score": 2}
    for got, prompt in ((score, second), (again, second[:150])):
        expected = pytorch(model, [*prompt, 9, 10])
        wanted = [expected[len(prompt) - 1][9], expected[len(prompt)][10]]
        assert [entry.logprob for entry in got.tokens] == pytest.approx(wanted, abs=1e-4)


def test_what_a_later_continuation_wrote_over_is_not_taken_for_there(engine: Engine, model: torch.nn.Module) -> None:
    prompt = PROMPT[:60]
    engine.score(prompt, [[5, 6, 7, 8], [9, 10, 11, 12]])
    [score] = engine.score([*prompt, 5, 6, 7], [[20, 21]])
    expected = pytorch(model, [*prompt, 5, 6, 7, 20, 21])
    assert [entry.logprob for entry in score.tokens] == pytest.approx([expected[62][20], expected[63][21]], abs=1e-4)


def test_generating_in_between_is_noticed(engine: Engine, model: torch.nn.Module) -> None:
    prompt = PROMPT[:50]
    [before] = engine.score(prompt, [[9, 10]])
    engine.generate(PROMPT[100:160], max_tokens=2)
    [after] = engine.score(prompt, [[9, 10]])
    list(engine.stream_reply([*prompt, 9, 10, 11], max_tokens=1))
    assert after == before
    with ServingLoop(engine) as loop:
        with pytest.raises(UserError, match="in use by a serving loop"):
            engine.score(prompt, [[9]])
        loop.submit(PROMPT[100:160], SamplingParams(max_tokens=1)).result(60)
    assert engine.score(prompt, [[9, 10]]) == [before]


def test_texts_are_scored_as_the_tokens_of_both_together(engine: Engine) -> None:
    texts = engine.score("The largest city in Japan is", [" Tokyo", " New York."])
    prompt = engine.encode("The largest city in Japan is")
    wholes = [engine.encode("The largest city in Japan is" + rest) for rest in (" Tokyo", " New York.")]
    assert all(whole[: len(prompt)] == prompt for whole in wholes)
    assert texts == engine.score(prompt, [whole[len(prompt) :] for whole in wholes])
    assert engine.encode("New Yor")[-1] != engine.encode("New York")[-1]
    [inside] = engine.score("New Yor", ["k"])
    assert [entry.token for entry in inside.tokens] == engine.encode("New York")[-len(inside.tokens) :]


def test_texts_that_are_one_token_together_cannot_be_cut(tiny_bundle: Path) -> None:
    """As they may be where no BOS comes before them."""
    bundle = Bundle.open(tiny_bundle)

    def encode(text: str) -> list[int]:
        return {"New": [5], "s": [6], "New York": [5, 7], "News": [9], "New Yorks": [5, 8]}[text]

    with pytest.raises(PromptError, match=r"the prompt and continuations\[0\] are one token together: give a longer"):
        scored_pair("New", "s", "continuations[0]", encode, bundle, 64)
    assert scored_pair("New", " York", "", encode, bundle, 64) == ((5,), (7,))
    assert scored_pair("New York", "s", "", encode, bundle, 64) == ((5,), (8,)), "the token that both are part of"


@pytest.mark.parametrize(
    ("prompt", "continuations", "message"),
    [
        ([1, 5], [[7], []], r"continuations\[1\] is empty"),
        ("a", [""], r"continuations\[0\] is empty"),
        ("", ["a"], "the prompt is empty"),
        ([], [[5]], "the prompt is empty"),
        ([1, 5], ["a"], r"continuations\[0\] is a text, but the prompt is token ids"),
        ([1, 5], [[32002]], "token id 32002 at position 0 is outside the model's vocabulary"),
        ([5] * (MAX_SEQ - 1), [[5, 5, 5]], f"{MAX_SEQ + 1} tokens, but the KV cache holds {MAX_SEQ}"),
    ],
)
def test_bad_continuations_are_refused_by_name(
    engine: Engine, prompt: list[int] | str, continuations: list[list[int]], message: str
) -> None:
    with pytest.raises(PromptError, match=message):
        engine.score(prompt, continuations)


def test_the_last_token_of_a_continuation_needs_no_position(engine: Engine) -> None:
    [score] = engine.score([5] * (MAX_SEQ - 1), [[5, 7]])
    assert len(score.tokens) == 2


class CountingBackend:
    """Counts the tokens that an engine's backend is given from now on."""

    def __init__(self, engine: Engine) -> None:
        self.tokens = {"prefill": 0, "score": 0}
        for name in self.tokens:
            setattr(engine.backend, name, self._counted(name, getattr(type(engine.backend), name), engine.backend))

    def _counted(self, name: str, method: object, backend: object) -> object:
        def call(row: int, tokens: npt.NDArray[np.int64], start: int) -> object:
            self.tokens[name] += len(tokens)
            return method(backend, row, tokens, start)  # type: ignore[operator]

        return call


# Bounds.


@pytest.mark.parametrize(
    ("vocab", "chunk", "most"), [(32_002, 256, 256), (49_152, 512, 341), (151_936, 256, 110), (5_000_000, 256, 17)]
)
def test_a_run_holds_64_mib_of_logits_and_never_fewer_rows_than_a_draft(vocab: int, chunk: int, most: int) -> None:
    assert most_scored(vocab, chunk) == most
    assert most * vocab * 4 <= SCORE_BYTES or most == MOST_VERIFIED
    assert most_scored(vocab, 8) == 8


PEAK = """
import json, sys
from pathlib import Path
from starling.engine.engine import Engine
from starling.engine.generation.sampling_params import SamplingParams

def peak():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)

with Engine(sys.argv[1], max_seq=1024, threads=1) as engine:
    engine.generate([5] * 1000, max_tokens=1)
    before = peak()
    result = engine.generate([5] * 1000, SamplingParams(max_tokens=0, prompt_logprobs=1))
    print(json.dumps([len(result.prompt_logprobs), peak() - before]))
"""


def test_memory_is_bounded_by_the_chunk(tmp_path: Path, tiny_checkpoint: Checkpoint) -> None:
    """1,000 tokens of a vocabulary of 151,936 have 580 MiB of logits."""
    family = Family("wide", "llama", {"vocab_size": 151_936, "num_hidden_layers": 1, "max_position_embeddings": 1024})
    folder = random_folder(family, tiny_checkpoint, tmp_path / "checkpoint")
    export_bundle(open_checkpoint(str(folder)), tmp_path / "bundle", ExportOptions(check=False))
    command = [sys.executable, "-c", PEAK, str(tmp_path / "bundle")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    count, kibibytes = json.loads(done.stdout)
    assert count == 1000
    assert kibibytes < 1.5 * SCORE_BYTES / 1024


def test_backends_that_give_the_last_logits_alone_say_so(tiny_tensorrt_bundle: Path) -> None:
    """Nothing is refused but what needs them."""
    with Engine(tiny_tensorrt_bundle, backend="onnxruntime-cpu", max_seq=32, threads=1) as engine:
        reason = "its graph gives the last token's logits only, so no prompt can be scored: export it with --dialect"
        with pytest.raises(SamplingError, match=f"prompt_logprobs cannot be had: .*{reason}") as refused:
            engine.generate([1, 5], SCORED)
        assert refused.value.field == "prompt_logprobs"
        with pytest.raises(BackendError, match=reason):
            engine.score([1, 5], [[7]])
        with pytest.raises(BackendError, match=reason):
            engine.backend.score(0, np.array([1, 5]), 0)
        assert engine.generate([1, 5], max_tokens=0).finish_reason == "length"


def test_a_run_outside_of_its_bounds_is_refused(engine: Engine) -> None:
    most = engine.backend.most_scored
    for count in (0, most + 1):
        with pytest.raises(BackendError, match=f"{count} tokens are to be scored in one run: give 1 to {most}"):
            engine.backend.score(0, np.zeros(count, np.int64), 0)
    with pytest.raises(BackendError, match="position 1024 of row 0 lies outside the KV cache"):
        engine.backend.score(0, np.zeros(2, np.int64), MAX_SEQ - 1)


def test_logits_that_are_no_numbers_end_the_request_alone(tiny_bundle: Path) -> None:
    with Engine(Bundle.open(tiny_bundle), max_seq=64, threads=1) as engine:
        assert isinstance(engine.backend, OrtBackend)
        good = engine.generate(PROMPT[:20], SCORED)
        run = engine.backend._run

        def spoil(binding: object) -> None:
            run(binding)
            assert isinstance(engine.backend, OrtBackend)
            assert engine.backend._scores is not None
            engine.backend._scores._raw[7] = np.nan

        engine.backend._run = spoil  # type: ignore[method-assign]
        with pytest.raises(BackendError, match="greatest logit is nan"):
            engine.generate(PROMPT[:20], SCORED)
        del engine.backend._run
        assert engine.generate(PROMPT[:20], SCORED).prompt_logprobs == good.prompt_logprobs

"""A draft model beside the target: the same tokens as without it, whatever it says; and when it is refused."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from starling.engine import Engine
from starling.engine.backends.backend import Backend
from starling.engine.batching.draft_model import FEW, MOST, DraftModel, draft_lengths
from starling.engine.batching.step_costs import StepCosts
from starling.engine.errors import BackendError, UserError
from starling.engine.generation.results import GenerationResult
from starling.engine.generation.sampling_params import SamplingParams
from starling.engine.serving_loop import ServingLoop
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.exporter import ExportOptions, export_bundle
from starling.export.quantization.blocks import BlockQuantization

MAX_SEQ = 192
PROMPTS = [list(range(900 + 7 * i, 920 + 11 * i)) for i in range(6)]
GREEDY = SamplingParams(max_tokens=40, ignore_eos=True)
DRAWN = replace(GREEDY, temperature=0.8, top_p=0.95, seed=11)


class Eager(DraftModel):
    """Drafts at each step, whether it pays or not: of a model so small nothing does."""

    def lengths(self, requests, costs, most, late=()):  # type: ignore[no-untyped-def]
        return [
            0 if i in late else max(0, min(4, most // len(requests), one.sequence.limit - len(one.sequence.tokens) - 1))
            for i, one in enumerate(requests)
        ]


@pytest.fixture(scope="module")
def int8_bundle(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """starling-tiny in int8: it foretells the fp32 model often, and not always."""
    out = tmp_path_factory.mktemp("draft") / "tiny-int8"
    export_bundle(tiny_checkpoint, out, ExportOptions(quantization=BlockQuantization("int8"), check=False))
    return out


@pytest.fixture(scope="module", params=["int8", "itself"])
def engine(tiny_bundle: Path, int8_bundle: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    draft = {"int8": int8_bundle, "itself": tiny_bundle}[request.param]
    with Engine(tiny_bundle, draft=draft, backend="onnxruntime-cpu", max_seq=MAX_SEQ, max_batch=4, threads=1) as engine:
        assert engine.draft is not None
        engine.draft = Eager(engine.draft.backend)
        yield engine


@pytest.fixture
def apart(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft that runs row by row, as on backends that do not mix."""
    assert engine.draft is not None
    monkeypatch.setattr(engine.draft.backend, "most_mixed", 0)


def written(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each row's part in each run from now on."""
    runs: list[int] = []
    mix, prefill = backend.mix, backend.prefill

    def mixed(parts, kept):  # type: ignore[no-untyped-def]
        runs.extend(len(part.tokens) for part in parts)
        return mix(parts, kept)

    def prefilled(row, tokens, start):  # type: ignore[no-untyped-def]
        runs.append(len(tokens))
        return prefill(row, tokens, start)

    monkeypatch.setattr(backend, "mix", mixed)
    monkeypatch.setattr(backend, "prefill", prefilled)
    return runs


def answers(engine: Engine, params: SamplingParams, speculation: str | None) -> list[GenerationResult]:
    engine.speculation = speculation
    return [engine.generate(prompt, params) for prompt in PROMPTS]


def served(engine: Engine, params: SamplingParams, speculation: str | None) -> list[GenerationResult]:
    engine.speculation = speculation
    with ServingLoop(engine, prefill_chunk=16) as loop:
        handles = [loop.submit(prompt, params) for prompt in (*PROMPTS, *PROMPTS[:2])]
        return [handle.result(120) for handle in handles]


@pytest.mark.parametrize("params", [GREEDY, DRAWN, replace(DRAWN, repetition_penalty=1.2, logprobs=1)], ids=str)
def test_a_row_alone_answers_the_same(engine: Engine, params: SamplingParams) -> None:
    plain, drafted = (answers(engine, params, how) for how in (None, "draft-model"))
    assert [one.tokens for one in drafted] == [one.tokens for one in plain]
    assert [one.text for one in drafted] == [one.text for one in plain]
    timings = [one.timings for one in drafted]
    assert sum(one.drafted_tokens for one in timings) > 40
    assert all(one.timings.drafted_tokens == 0 for one in plain)
    if not params.temperature:
        assert sum(one.accepted_tokens for one in timings) > 20


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=str)
def test_rows_of_a_serving_loop_answer_the_same(engine: Engine, params: SamplingParams) -> None:
    plain, drafted = (served(engine, params, how) for how in (None, "draft-model"))
    assert [one.tokens for one in drafted] == [one.tokens for one in plain]
    if engine.backend.most_mixed:
        assert sum(one.timings.drafted_tokens for one in drafted) > 40


@pytest.mark.usefixtures("apart")
def test_a_draft_that_cannot_mix_rows_drafts_them_one_by_one(engine: Engine) -> None:
    plain, drafted = (served(engine, GREEDY, how) for how in (None, "draft-model"))
    assert [one.tokens for one in drafted] == [one.tokens for one in plain]
    assert sum(one.timings.accepted_tokens for one in drafted) > 20


def test_the_model_itself_as_its_draft_is_always_right(engine: Engine) -> None:
    assert engine.draft is not None
    if engine.draft.backend.kernels != engine.backend.kernels or engine.bundle.quantization is not None:
        pytest.skip("of a draft of the same precision")
    results = answers(engine, GREEDY, "draft-model")
    shares = [one.timings.accepted_tokens / one.timings.drafted_tokens for one in results]
    assert max(shares) > 0.9


def test_a_prompt_that_is_known_is_known_to_both(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    draft, prompt = engine.draft, list(range(1000, 1100))
    assert draft is not None
    runs = written(draft.backend, monkeypatch)
    engine.speculation = "draft-model"
    with ServingLoop(engine) as loop:
        first = loop.submit([*prompt, 5, 6, 7], GREEDY).result(60)
        assert sum(runs) >= len(prompt)
        runs.clear()
        handles = [loop.submit([*prompt, 8 + number, 9], GREEDY) for number in range(4)]  # other rows, too
        results = [handle.result(60) for handle in handles]
    assert max(runs) <= 40
    assert all(one.timings.reused_tokens >= 96 for one in results)
    engine.speculation = None
    assert first.tokens == engine.generate([*prompt, 5, 6, 7], GREEDY).tokens
    for number, one in enumerate(results):
        assert one.tokens == engine.generate([*prompt, 8 + number, 9], GREEDY).tokens


def test_choices_of_one_prompt_are_drafted_for_too(engine: Engine) -> None:
    found = []
    for how in (None, "draft-model"):
        engine.speculation = how
        found.append([one.tokens for one in engine.generate_choices(PROMPTS[0], DRAWN, n=3)])
    assert found[0] == found[1]


@pytest.mark.parametrize("error", [BackendError("no memory"), MemoryError()], ids=repr)
def test_a_draft_that_fails_costs_drafts_and_no_answer(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    plain = answers(engine, GREEDY, None)
    assert engine.draft is not None

    def fails(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        for name in ("mix", "prefill"):
            patch.setattr(engine.draft.backend, name, fails)
        drafted = answers(engine, GREEDY, "draft-model")
    assert [one.tokens for one in drafted] == [one.tokens for one in plain]
    assert all(one.timings.drafted_tokens == 0 for one in drafted)
    again = answers(engine, GREEDY, "draft-model")
    assert [one.tokens for one in again] == [one.tokens for one in plain]
    assert sum(one.timings.accepted_tokens for one in again) > 20


@pytest.mark.parametrize("copy", ["fork", "load", "save"])
def test_copies_of_a_draft_that_fail_cost_no_answer(engine: Engine, monkeypatch: pytest.MonkeyPatch, copy: str) -> None:
    prompt = [*map(ord, copy), *range(1000, 1100)]  # which no row knows yet
    params = replace(GREEDY, max_tokens=8)

    def fails(*_: object) -> None:
        raise BackendError("no memory")

    found = []
    for how in (None, "draft-model"):
        engine.speculation = how
        with ServingLoop(engine) as loop:
            if how is not None:
                assert engine.draft is not None
                assert engine.draft.prefixes is not None
                monkeypatch.setattr(engine.draft.prefixes.copies, copy, fails)
            first = loop.submit([*prompt, 5], params).result(60)
            again = [loop.submit([*prompt, number], params) for number in (6, 7)]  # other rows, too
            results = [first, *(handle.result(60) for handle in (*again, *loop.submit_choices(prompt, params, n=2)))]
        found.append([one.tokens for one in results])
    assert found[0] == found[1]


class Idle(DraftModel):
    """Drafts for nothing."""

    def lengths(self, requests, costs, most, late=()):  # type: ignore[no-untyped-def]
        return [0] * len(requests)


def test_a_row_is_written_when_it_is_drafted_for(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine.draft is not None
    backend = engine.draft.backend
    runs = written(backend, monkeypatch)
    monkeypatch.setattr(engine, "draft", Idle(backend))
    plain = served(engine, GREEDY, "draft-model")
    assert not runs
    monkeypatch.setattr(engine, "draft", Eager(backend))
    drafted = served(engine, GREEDY, "draft-model")
    assert [one.tokens for one in drafted] == [one.tokens for one in plain]
    assert sum(one.timings.accepted_tokens for one in drafted) > 20
    assert any(FEW < length < len(PROMPTS[0]) for length in runs)  # in pieces beside others
    monkeypatch.setattr(engine, "draft", Eager(backend))
    runs.clear()
    engine.speculation = "draft-model"
    engine.generate(PROMPTS[0], GREEDY)
    assert runs[0] >= len(PROMPTS[0])  # alone at once


def test_models_that_take_turns_do_not_spin(tiny_bundle: Path, int8_bundle: Path) -> None:
    def stops(backend: Backend) -> str:
        options = backend._session.get_session_options()  # type: ignore[attr-defined]
        return str(options.get_session_config_entry("session.force_spinning_stop"))

    with Engine(tiny_bundle, draft=int8_bundle, backend="onnxruntime-cpu", max_seq=64, threads=1) as engine:
        assert engine.draft is not None
        assert (stops(engine.backend), stops(engine.draft.backend)) == ("1", "1")


def costs(*, quiet: float = 0.02, drafted: float = 0.001, rows: int = 1) -> StepCosts:
    made = StepCosts()
    made.decoded(rows, quiet, after_chunk=False)
    for tokens in (2, 4, 8, 3, 6) * 8:
        made.mixed(rows, quiet + tokens * drafted, prompt=0, position=0, drafted=tokens)
    return made


class TestLengths:
    """How long drafts are, from what steps took."""

    def test_better_chances_make_longer_drafts(self) -> None:
        lengths = [
            draft_lengths([chance], [50], costs(), 16, lambda _: 0.004, [0.0])[0] for chance in (0.1, 0.5, 0.7, 0.95)
        ]
        assert lengths == sorted(lengths)
        assert (lengths[0], lengths[-1]) == (0, MOST)

    def test_a_draft_that_costs_what_a_step_does_is_not_run(self) -> None:
        assert draft_lengths([0.9], [50], costs(), 16, lambda _: 0.02, [0.0]) == [0]

    def test_each_row_by_its_own_chances(self) -> None:
        lengths = draft_lengths([0.95, 0.2], [50, 50], costs(rows=2), 32, lambda _: 0.002, [0.0, 0.0])
        assert lengths[0] > 3
        assert lengths[1] <= 1

    def test_a_full_batch_where_verifying_costs_more_than_it_gains_is_left_alone(self) -> None:
        assert (
            sum(
                draft_lengths(
                    [0.6] * 8, [50] * 8, costs(quiet=0.02, drafted=0.002, rows=8), 56, lambda _: 0.003, [0.0] * 8
                )
            )
            == 0
        )

    def test_what_a_row_lacks_counts_with_its_first_token(self) -> None:
        assert draft_lengths([0.9], [50], costs(), 16, lambda _: 0.004, [0.0])[0] > 2
        assert draft_lengths([0.9], [50], costs(), 16, lambda _: 0.004, [0.05]) == [0]

    def test_room_and_the_most_of_a_run_are_kept(self) -> None:
        lengths = draft_lengths([0.95, 0.95, 0.95], [2, 0, 50], costs(rows=3), 5, lambda _: 0.0, [0.0] * 3)
        assert lengths[0] <= 2
        assert lengths[1] == 0
        assert sum(lengths) <= 5


def test_another_vocabulary_is_refused_by_its_first_difference(tiny_bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_bundle, other)
    text = (other / "tokenizer.json").read_text()
    changed = text.replace("<|pad_0|>", "<|pad_9|>")
    assert changed != text
    (other / "tokenizer.json").write_text(changed)
    _accept_changed(other, "tokenizer.json")
    with pytest.raises(
        UserError,
        match=r"cannot draft for .*: its vocabulary is another one \('<\|pad_[09]\|>' is (no token|token 32001) here",
    ):
        Engine(tiny_bundle, draft=other, backend="onnxruntime-cpu", max_seq=64, threads=1)


def test_a_draft_that_is_none_is_refused(tiny_bundle: Path, embedding_bundle: Path) -> None:
    with pytest.raises(UserError, match="embed"):
        Engine(tiny_bundle, draft=embedding_bundle, backend="onnxruntime-cpu", max_seq=64, threads=1)
    with (
        Engine(tiny_bundle, backend="onnxruntime-cpu", max_seq=64, threads=1) as engine,
        pytest.raises(UserError, match="no draft is there"),
    ):
        engine.speculation = "draft-model"


def _accept_changed(folder: Path, name: str) -> None:
    """Write the changed file's size and digest into bundle.json."""
    import json
    from hashlib import sha256

    content = (folder / name).read_bytes()
    manifest = json.loads((folder / "bundle.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    (folder / "bundle.json").write_text(json.dumps(manifest))

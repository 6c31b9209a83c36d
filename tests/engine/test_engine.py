"""The Python API: prompts as text or ids, one or many, streamed or whole, and one clear line for each bad one."""

import _thread
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Timer

import numpy as np
import pytest
from command_line import copy_bundle, replace_recorded

from starling.engine.bundle.manifest import Bundle
from starling.engine.engine import Engine
from starling.engine.errors import BundleError, PromptError, SamplingError, UserError
from starling.engine.generation.results import GenerationInterrupted
from starling.engine.generation.sampling_params import SamplingParams
from starling.engine.names import DEFAULT_MAX_SEQ

MAX_SEQ = 48
SHORT = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Iterator[Engine]:
    with Engine(tiny_bundle, max_seq=MAX_SEQ, max_batch=2, threads=1) as engine:
        yield engine


def test_text_and_its_ids_are_the_same_prompt(engine: Engine) -> None:
    text = engine.generate("Hello there", SHORT)
    ids = engine.generate(engine.tokenizer.encode("Hello there"), SHORT)
    array = engine.generate(np.array(engine.tokenizer.encode("Hello there")), SHORT)  # type: ignore[call-overload]
    assert text.prompt_tokens == ids.prompt_tokens
    assert text.tokens == ids.tokens == array.tokens
    assert len(text.tokens) == 6


def test_a_list_of_prompts_gives_a_list_of_results(engine: Engine) -> None:
    prompts = ["Hello there", "The starling is a bird that"]
    together = engine.generate(prompts, SHORT)
    assert [result.text for result in together] == [engine.generate(prompt, SHORT).text for prompt in prompts]
    [single] = engine.generate([[1, 420, 6316]], SHORT)
    assert single.tokens == engine.generate([1, 420, 6316], SHORT).tokens


def test_a_row_that_ends_before_the_others_keeps_what_a_next_turn_reuses(engine: Engine) -> None:
    first, second = [1, 420, 6316, 28781], [1, 315, 837]
    ends = engine.generate(first, SHORT).tokens[2]
    params = SamplingParams(max_tokens=30, ignore_eos=True, stop_token_ids=(ends,))
    early, late = engine.generate([first, second], params)
    assert len(early.tokens) == 3 < len(late.tokens)
    turn = [*first, *early.tokens, 420, 6316]
    stream = engine.stream_reply(turn, SHORT)
    reply = [chunk.token for chunk in stream]
    assert stream.result.timings.reused_tokens == len(first) + 2  # all but the token that was never decoded
    assert tuple(reply) == engine.generate(turn, SHORT).tokens


def test_overrides_change_single_settings(engine: Engine) -> None:
    assert len(engine.generate("Hello", SHORT, max_tokens=3).tokens) == 3
    assert len(engine.generate("Hello", max_tokens=2, ignore_eos=True).tokens) == 2


def test_unknown_and_impossible_settings_are_refused(engine: Engine) -> None:
    near = r"unknown sampling setting 'temprature' \(did you mean 'temperature'\?\); the settings are temperature, "
    with pytest.raises(SamplingError, match=near):
        engine.generate("Hello", temprature=1)
    with pytest.raises(SamplingError, match=r"did you mean 'max_tokens'\?"):
        engine.stream("Hello", max_toknes=8)
    with pytest.raises(SamplingError, match="unknown sampling setting 'colour'; the settings are"):
        engine.generate("Hello", colour=1)
    with pytest.raises(SamplingError, match="top_p is 2"):
        engine.stream("Hello", top_p=2)


def test_stream_ends_with_the_result(engine: Engine) -> None:
    whole = engine.generate("Hello there", SHORT)
    stream = engine.stream("Hello there", SHORT)
    chunks = list(stream)
    assert "".join(chunk.text for chunk in chunks) == stream.result.text == whole.text
    assert chunks[-1].finish_reason == stream.result.finish_reason == "length"


def test_answer_ends_with_the_cache(engine: Engine) -> None:
    result = engine.generate([1] * (MAX_SEQ - 4), max_tokens=1000, ignore_eos=True)
    assert (len(result.tokens), result.finish_reason) == (5, "length")
    assert len(engine.generate([1] * MAX_SEQ, max_tokens=1000, ignore_eos=True).tokens) == 1


@pytest.mark.parametrize("prompt", ["", [], ()])
def test_empty_prompt_is_refused(engine: Engine, prompt: str) -> None:
    with pytest.raises(PromptError, match="the prompt is empty"):
        engine.generate(prompt)
    with pytest.raises(PromptError, match="the prompt is empty"):
        engine.generate([[1], prompt])  # type: ignore[list-item]


def test_a_bad_tokenizer_leaves_no_open_session(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = copy_bundle(tiny_bundle, tmp_path / "bundle")
    replace_recorded(folder, "tokenizer.json", b"{}")
    with pytest.raises(BundleError, match="is not a tokenizer") as caught:
        Engine(folder, max_seq=MAX_SEQ, threads=1)
    half_made = next(entry.frame.f_locals["self"] for entry in caught.traceback if "self" in entry.frame.f_locals)
    with pytest.raises((TypeError, AttributeError, LookupError)):
        half_made.backend.decode([1], [0])


def test_prompt_beyond_the_cache_says_both_lengths(engine: Engine) -> None:
    most = engine.bundle.architecture.max_positions
    with pytest.raises(PromptError) as caught:
        engine.stream([1] * (MAX_SEQ + 1))
    assert str(caught.value) == (
        f"the prompt has {MAX_SEQ + 1} tokens, but the KV cache holds {MAX_SEQ}: "
        f"shorten it, or raise --max-seq (this model: up to {most})"
    )


@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_ids_outside_the_vocabulary_are_named(engine: Engine, beyond: int) -> None:
    vocabulary = engine.bundle.architecture.vocab_size
    token = -1 if beyond < 0 else vocabulary + beyond
    said = rf"token id {token} at position 2 is outside the model's vocabulary \(0 to {vocabulary - 1}\)"
    with pytest.raises(PromptError, match=said):
        engine.generate([1, 2, token])


def test_ids_that_are_no_numbers_are_refused(engine: Engine) -> None:
    with pytest.raises(PromptError, match="a prompt is text or a list of token ids"):
        engine.generate([1, 2.5])  # type: ignore[list-item]


def test_more_prompts_than_rows_are_refused(engine: Engine) -> None:
    with pytest.raises(PromptError, match=r"3 prompts, but the KV cache has 2 row\(s\)"):
        engine.generate(["a", "b", "c"])


@pytest.mark.parametrize("wrong", [0, -5, 10**9])
def test_max_seq_must_fit_the_model(tiny_bundle: Path, wrong: int) -> None:
    most = Bundle.open(tiny_bundle).architecture.max_positions
    with pytest.raises(PromptError, match=rf"max_seq is {wrong}, but this model has {most} positions: give 1"):
        Engine(tiny_bundle, max_seq=wrong)


def test_default_cache_is_modest_and_its_bytes_are_told(tiny_bundle: Path) -> None:
    with Engine(Bundle.open(tiny_bundle), threads=1) as engine:
        assert engine.max_seq == min(DEFAULT_MAX_SEQ, engine.bundle.architecture.max_positions)
        assert engine.kv_cache_bytes == engine.max_seq * engine.bundle.kv_cache.bytes_per_token
        assert engine.load_seconds > 0


def test_missing_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such folder"):
        Engine(tmp_path / "nothing")


def test_a_stream_that_lost_its_cache_says_so(engine: Engine) -> None:
    first = engine.stream("Hello there", SHORT)
    opening = next(first)
    fresh = engine.generate("Another prompt", SHORT)
    with pytest.raises(UserError, match="ended by a later generation on the same engine"):
        next(first)
    assert (first.result.tokens, first.result.finish_reason) == ((opening.token,), "interrupted")
    assert engine.generate("Another prompt", SHORT).tokens == fresh.tokens


def test_ctrl_c_stops_a_whole_generation_and_leaves_the_engine_usable(tiny_bundle: Path) -> None:
    with Engine(tiny_bundle, max_seq=2048, threads=1) as engine:
        before = engine.generate("Hello there", SHORT)
        Timer(0.2, _thread.interrupt_main).start()
        with pytest.raises(GenerationInterrupted) as interruption:
            engine.generate("Hello there", max_tokens=2000, ignore_eos=True)
        [partial] = interruption.value.results
        assert partial.finish_reason == "interrupted"
        assert partial.tokens[: len(before.tokens)] == before.tokens[: len(partial.tokens)]
        assert engine.generate("Hello there", SHORT).tokens == before.tokens


def test_a_batch_of_replies_reads_as_the_chat_does(engine: Engine) -> None:
    ids = engine.apply_chat_template([{"role": "user", "content": "Hello"}])
    alone = engine.chat().send("Hello", SHORT)
    assert [result.text for result in engine.generate([ids, ids], SHORT, reply=True)] == [alone.text] * 2


def test_time_to_first_token_includes_encoding(engine: Engine) -> None:
    timings = engine.generate("Hello there " * 10, SHORT).timings
    assert timings.ttft_s > timings.prefill_model_s > 0
    assert timings.total_s == pytest.approx(timings.ttft_s + sum(timings.itl_s))


def test_template_ids_are_those_of_the_chat_templates(engine: Engine) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    assert engine.apply_chat_template(messages) == engine.chat_templates.encode(messages, engine.tokenizer)
    with pytest.raises(PromptError, match="there is no chat template 'nonsense'"):
        engine.apply_chat_template(messages, "nonsense")


def test_importing_the_engine_loads_nothing_heavy() -> None:
    heavy = ["onnxruntime", "torch", "transformers", "onnx", "jinja2", "rich"]
    code = f"import sys, starling.engine.engine; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_real_model_knows_the_capital_of_france(demo_bundle: Path) -> None:
    with Engine(demo_bundle, max_seq=256) as engine:
        ids = engine.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}])
        result = engine.generate(ids, max_tokens=32)
    assert "Paris" in result.text
    assert result.finish_reason == "stop"

"""A chat answers as if each turn were prefilled afresh, and prefills only what is new."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from starling.engine.chat_session import ChatSession
from starling.engine.engine import Engine
from starling.engine.errors import PromptError
from starling.engine.generation.results import GenerationResult
from starling.engine.generation.sampling_params import SamplingParams

SHORT = SamplingParams(max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Iterator[Engine]:
    with Engine(tiny_bundle, max_seq=256, max_batch=2, threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def other(tiny_bundle: Path) -> Iterator[Engine]:
    """A second engine: what the chat should answer, without its cache."""
    with Engine(tiny_bundle, max_seq=256, threads=1) as engine:
        yield engine


def fresh(other: Engine, chat: ChatSession, text: str) -> GenerationResult:
    """The answer to `text` after the chat so far, prefilled as a whole."""
    ids = other.apply_chat_template([*chat.messages, {"role": "user", "content": text}])
    return other.generate(ids, SHORT)


def test_every_turn_answers_as_prefilled_afresh(engine: Engine, other: Engine) -> None:
    chat = engine.chat()
    for turn, text in enumerate(["Hello", "How are you today?", "And tomorrow?"]):
        wanted = fresh(other, chat, text)
        result = chat.send(text, SHORT)
        assert result.tokens == wanted.tokens
        assert result.prompt_tokens == wanted.prompt_tokens
        assert wanted.timings.reused_tokens == 0
        assert (result.timings.reused_tokens > 10) == (turn > 0)


def test_only_what_is_new_is_prefilled(engine: Engine) -> None:
    chat = engine.chat()
    first = chat.send("Hello", SHORT)
    second = chat.send("How are you today?", SHORT)
    assert second.timings.prefilled_tokens == second.timings.prompt_tokens - second.timings.reused_tokens
    # All of the first prompt stands in the cache; how much of the reply does depends on how its text is cut again.
    assert second.timings.reused_tokens >= len(first.prompt_tokens)
    again = engine.generate(second.prompt_tokens, SHORT)
    assert again.timings.reused_tokens == 0, "a plain generation is measured whole"


def test_system_message_comes_first(engine: Engine) -> None:
    chat = engine.chat(system="You answer briefly.")
    chat.send("Hello", SHORT)
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant"]
    assert chat.messages[0]["content"] == "You answer briefly."
    chat.reset()
    assert [message["role"] for message in chat.messages] == ["system"]


def test_reply_is_kept_as_it_was_shown(engine: Engine) -> None:
    chat = engine.chat()
    stream = chat.stream("Hello", SHORT)
    text = "".join(chunk.text for chunk in stream)
    assert chat.messages == [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": text}]
    assert not text.startswith(" ")


def test_interrupted_turn_keeps_the_partial_reply(engine: Engine, other: Engine) -> None:
    chat = engine.chat()
    chat.send("Hello", SHORT)
    stream = chat.stream("How are you today?", SHORT)
    shown = "".join(next(stream).text for _ in range(3))
    stream.close()
    assert chat.messages[-1] == {"role": "assistant", "content": stream.result.text}
    assert stream.result.text.startswith(shown)
    wanted = fresh(other, chat, "Go on")
    assert chat.send("Go on", SHORT).tokens == wanted.tokens


def test_turn_left_unread_ends_with_the_next_one(engine: Engine, other: Engine) -> None:
    chat = engine.chat()
    left = chat.stream("Hello", SHORT)
    for _ in range(4):
        next(left)
    partial = left.result.text
    wanted = fresh(other, chat, "Go on")
    assert chat.send("Go on", SHORT).tokens == wanted.tokens
    assert [message["content"] for message in chat.messages[:2]] == ["Hello", partial]


def test_turn_without_any_reply_is_dropped(engine: Engine) -> None:
    chat = engine.chat()
    chat.stream("Hello", SHORT).close()
    assert chat.messages == []
    chat.send("Hello again", SHORT)
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]


def test_other_generations_between_turns_change_nothing(engine: Engine, other: Engine) -> None:
    chat, second_chat = engine.chat(), engine.chat(system="Speak like a pirate.")
    chat.send("Hello", SHORT)
    for between in (
        lambda: engine.generate("Something else entirely", SHORT),
        lambda: engine.generate(["Two", "prompts"], SHORT),
        lambda: second_chat.send("Ahoy", SHORT),
        lambda: next(engine.stream("A stream that is left", SHORT)),
    ):
        between()
        wanted = fresh(other, chat, "And now?")
        assert chat.send("And now?", SHORT).tokens == wanted.tokens


def test_reset_forgets_the_turns(engine: Engine, other: Engine) -> None:
    chat = engine.chat()
    chat.send("Hello", SHORT)
    chat.reset()
    assert chat.messages == []
    wanted = fresh(other, chat, "Hello again")
    assert chat.send("Hello again", SHORT).tokens == wanted.tokens


def test_question_beyond_the_cache_leaves_the_chat_as_it_was(engine: Engine, other: Engine) -> None:
    chat = engine.chat()
    chat.send("Hello", SHORT)
    before = chat.messages
    with pytest.raises(PromptError, match="but the KV cache holds 256"):
        chat.send("word " * 300, SHORT)
    assert chat.messages == before
    wanted = fresh(other, chat, "Go on")
    assert chat.send("Go on", SHORT).tokens == wanted.tokens


def test_real_model_remembers_the_turn_before(demo_bundle: Path) -> None:
    with Engine(demo_bundle, max_seq=512) as engine:
        chat = engine.chat()
        assert "Paris" in chat.send("What is the capital of France?", max_tokens=48).text
        second = chat.send("What is the capital of Italy?", max_tokens=48)
    assert "Rome" in second.text
    assert second.timings.prefilled_tokens < second.timings.reused_tokens

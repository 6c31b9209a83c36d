"""What a client gets: OpenAI's completion and chat objects, whole or in chunks."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from starling.engine.generation.results import Timings
from starling.serving.api.token_texts import RankedTable, ShownToken, TokenTexts

Logprobs: TypeAlias = Sequence[ShownToken]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of the prompts, `cached` of which were not prefilled, of the answers (their end tokens too), and of what a
    reward model read (None: nothing)."""

    prompt: int
    answer: int
    cached: int = 0
    reward: int | None = None

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.prompt + other.prompt, self.answer + other.answer, self.cached + other.cached)

    def document(self) -> dict[str, Any]:
        """OpenAI's `usage`."""
        total = self.prompt + self.answer
        document = {"prompt_tokens": self.prompt, "completion_tokens": self.answer, "total_tokens": total}
        if self.reward is not None:
            document["reward_tokens"] = self.reward
        return document | {"prompt_tokens_details": {"cached_tokens": self.cached}}


@dataclass(frozen=True, slots=True)
class Choice:
    """One choice, ended."""

    text: str
    #: None where none were asked for.
    logprobs: Logprobs | None
    finish_reason: str
    #: OpenAI's `tool_calls`.
    calls: Sequence[dict[str, Any]] = ()
    #: What a reward model gave it; None where none was asked.
    reward: float | None = None
    #: vLLM's `prompt_logprobs` of its prompt; None where they were not asked for.
    prompt: Sequence[RankedTable | None] | None = None


class Reply(ABC):
    """The form of one request's answer; every object of it has the same id."""

    #: What the id begins with, and the `object` of a whole answer and of a chunk.
    prefix: str
    kinds: tuple[str, str]

    def __init__(self, model: str, texts: TokenTexts, *, stream: bool, with_usage: bool) -> None:
        """`with_usage`: chunks say `"usage": null`, since the stream ends with it."""
        self._texts = texts
        self._no_usage = {"usage": None} if with_usage else {}
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "object": self.kinds[stream],
            "created": int(time.time()),
            "model": model,
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk before a choice's first text, if there is one."""
        return None

    def chunk(
        self,
        index: int,
        text: str,
        logprobs: Logprobs | None,
        finish_reason: str | None,
        calls: Sequence[dict[str, Any]] = (),
    ) -> dict[str, Any]:
        """A piece of a choice; `calls` are a chat's `tool_calls`."""
        piece = {"index": index} | self._piece(text, logprobs, finish_reason, calls)
        return self._head | {"choices": [piece]} | self._no_usage

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """The chunk without choices that ends a stream with usage."""
        return self._head | {"choices": [], "usage": usage.document()}

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """The whole answer as one object."""
        return self._head | self.body(choices, usage)

    def body(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """The same without what differs from one run to the next: id, time and the model's name."""
        shown = [
            {"index": index}
            | self._choice(choice.text, choice.logprobs, choice.finish_reason, choice.calls)
            | ({} if choice.reward is None else {"reward": choice.reward})
            for index, choice in enumerate(choices)
        ]
        document: dict[str, Any] = {"object": self.kinds[0], "choices": shown, "usage": usage.document()}
        if choices[0].prompt is not None:
            self._add_prompts(document, choices)
        return document

    @abstractmethod
    def _add_prompts(self, document: dict[str, Any], choices: Sequence[Choice]) -> None:
        """Put `prompt_logprobs` where vLLM has them."""

    @abstractmethod
    def _piece(
        self, text: str, logprobs: Logprobs | None, finish_reason: str | None, calls: Sequence[dict[str, Any]]
    ) -> dict[str, Any]:
        """A chunk's choice, without its index."""

    @abstractmethod
    def _choice(
        self, text: str, logprobs: Logprobs | None, finish_reason: str, calls: Sequence[dict[str, Any]]
    ) -> dict[str, Any]:
        """A whole answer's choice, without its index."""


class CompletionReply(Reply):
    """Answers of /v1/completions."""

    prefix = "cmpl"
    kinds = ("text_completion", "text_completion")

    def _piece(
        self, text: str, logprobs: Logprobs | None, finish_reason: str | None, calls: Sequence[dict[str, Any]]
    ) -> dict[str, Any]:
        shown = None if logprobs is None else self._texts.completion(logprobs)
        return {"text": text, "logprobs": shown, "finish_reason": finish_reason}

    _choice = _piece

    def _add_prompts(self, document: dict[str, Any], choices: Sequence[Choice]) -> None:
        for shown, choice in zip(document["choices"], choices, strict=True):
            shown["prompt_logprobs"] = choice.prompt


class ChatReply(Reply):
    """Answers of /v1/chat/completions."""

    prefix = "chatcmpl"
    kinds = ("chat.completion", "chat.completion.chunk")

    def opening(self, index: int) -> dict[str, Any]:
        """The chunk that names the role."""
        choice = {"index": index} | self._delta({"role": "assistant", "content": ""}, None, None)
        return self._head | {"choices": [choice]} | self._no_usage

    def _piece(
        self, text: str, logprobs: Logprobs | None, finish_reason: str | None, calls: Sequence[dict[str, Any]]
    ) -> dict[str, Any]:
        delta: dict[str, Any] = {"content": text} if text else {}
        return self._delta(delta | ({"tool_calls": calls} if calls else {}), logprobs, finish_reason)

    def _add_prompts(self, document: dict[str, Any], choices: Sequence[Choice]) -> None:
        document["prompt_logprobs"] = choices[0].prompt  # all choices have the same prompt

    def _choice(
        self, text: str, logprobs: Logprobs | None, finish_reason: str, calls: Sequence[dict[str, Any]]
    ) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
        return {"message": message, "logprobs": self._shown(logprobs), "finish_reason": finish_reason}

    def _delta(self, delta: dict[str, Any], logprobs: Logprobs | None, finish_reason: str | None) -> dict[str, Any]:
        return {"delta": delta, "logprobs": self._shown(logprobs), "finish_reason": finish_reason}

    def _shown(self, logprobs: Logprobs | None) -> dict[str, Any] | None:
        return None if logprobs is None else self._texts.chat(logprobs)


def usage_of(generations: Sequence[Timings]) -> Usage:
    """What the generations of one prompt used, whose own tokens count once."""
    first = generations[0]
    return Usage(first.prompt_tokens, sum(each.new_tokens for each in generations), first.reused_tokens)

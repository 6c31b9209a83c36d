"""What a client gets: OpenAI's completion and chat objects, whole or in chunks."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeAlias

from starling.engine.generation.results import Timings
from starling.engine.generation.sampler import TokenLogprob
from starling.serving.api.token_texts import TokenTexts

#: Tokens with the offset of their text in the answer, in characters.
Logprobs: TypeAlias = Sequence[tuple[int, TokenLogprob]]


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

    def opening(self) -> dict[str, Any] | None:
        """The chunk before the first text, if there is one."""
        return None

    def chunk(self, text: str, logprobs: Logprobs | None, finish_reason: str | None) -> dict[str, Any]:
        """A piece of the answer."""
        return self._head | {"choices": [self._piece(text, logprobs, finish_reason)]} | self._no_usage

    def usage_chunk(self, timings: Timings) -> dict[str, Any]:
        """The chunk without choices that ends a stream with usage."""
        return self._head | {"choices": [], "usage": usage(timings)}

    def whole(self, text: str, logprobs: Logprobs | None, finish_reason: str, timings: Timings) -> dict[str, Any]:
        """The whole answer as one object."""
        return self._head | {"choices": [self._choice(text, logprobs, finish_reason)], "usage": usage(timings)}

    @abstractmethod
    def _piece(self, text: str, logprobs: Logprobs | None, finish_reason: str | None) -> dict[str, Any]:
        """The choice of a chunk."""

    @abstractmethod
    def _choice(self, text: str, logprobs: Logprobs | None, finish_reason: str) -> dict[str, Any]:
        """The choice of a whole answer."""


class CompletionReply(Reply):
    """Answers of /v1/completions."""

    prefix = "cmpl"
    kinds = ("text_completion", "text_completion")

    def _piece(self, text: str, logprobs: Logprobs | None, finish_reason: str | None) -> dict[str, Any]:
        shown = None if logprobs is None else self._texts.completion(logprobs)
        return {"index": 0, "text": text, "logprobs": shown, "finish_reason": finish_reason}

    _choice = _piece


class ChatReply(Reply):
    """Answers of /v1/chat/completions."""

    prefix = "chatcmpl"
    kinds = ("chat.completion", "chat.completion.chunk")

    def opening(self) -> dict[str, Any]:
        """The chunk that names the role."""
        choice = self._delta({"role": "assistant", "content": ""}, None, None)
        return self._head | {"choices": [choice]} | self._no_usage

    def _piece(self, text: str, logprobs: Logprobs | None, finish_reason: str | None) -> dict[str, Any]:
        return self._delta({"content": text} if text else {}, logprobs, finish_reason)

    def _choice(self, text: str, logprobs: Logprobs | None, finish_reason: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": 0, "message": message, "logprobs": self._shown(logprobs), "finish_reason": finish_reason}

    def _delta(self, delta: dict[str, Any], logprobs: Logprobs | None, finish_reason: str | None) -> dict[str, Any]:
        return {"index": 0, "delta": delta, "logprobs": self._shown(logprobs), "finish_reason": finish_reason}

    def _shown(self, logprobs: Logprobs | None) -> dict[str, Any] | None:
        return None if logprobs is None else self._texts.chat(logprobs)


def usage(timings: Timings) -> dict[str, int]:
    """Tokens of the prompt and of the answer, the end token counted."""
    prompt, answer = timings.prompt_tokens, timings.new_tokens
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}

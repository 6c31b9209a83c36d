"""A multi-turn chat on an engine: it keeps the messages, and prefills only what the KV cache does not hold yet."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Protocol, Unpack

from starling.engine.batching.generation_stream import GenerationStream
from starling.engine.generation.results import GenerationResult
from starling.engine.generation.sampling_params import SamplingOverrides, SamplingParams

Message = dict[str, str]


class ChatEngine(Protocol):
    """What a chat asks of an engine."""

    def apply_chat_template(self, messages: Sequence[Message], template: str | None = None) -> list[int]:
        """Token ids of `messages` up to where the answer begins."""
        ...

    def stream_reply(
        self,
        ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        encode_s: float = 0.0,
        **overrides: Unpack[SamplingOverrides],
    ) -> GenerationStream:
        """Stream the answer to a chat's token ids; `encode_s` are the seconds that rendering them took."""
        ...


class ChatSession:
    """A chat. Sessions and other generations may share an engine: what the cache holds is the engine's own knowledge.

    A turn that was interrupted keeps the part of the reply that there was; a turn without any is dropped, question
    and all, so that roles go on alternating.
    """

    def __init__(self, engine: ChatEngine, *, system: str | None = None, template: str | None = None) -> None:
        self._engine = engine
        self._template = template
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._settled: list[Message] = []
        self._turn: tuple[str, GenerationStream] | None = None

    @property
    def messages(self) -> list[Message]:
        """A copy of all messages, oldest first: system, user, assistant, …; a reply being streamed as far as it is."""
        return [dict(message) for message in self._system + self._settled + self._newest_turn()]

    def stream(
        self, text: str, params: SamplingParams | None = None, **overrides: Unpack[SamplingOverrides]
    ) -> GenerationStream:
        """Say `text` and stream the reply. Raises PromptError (the messages stay as they were) or SamplingError.

        Close the stream, or read it to its end: saying the next thing ends it otherwise.
        """
        self._settle()
        begin = perf_counter()
        messages = [*self._system, *self._settled, {"role": "user", "content": text}]
        ids = self._engine.apply_chat_template(messages, self._template)
        stream = self._engine.stream_reply(ids, params, encode_s=perf_counter() - begin, **overrides)
        self._turn = (text, stream)
        return stream

    def send(
        self, text: str, params: SamplingParams | None = None, **overrides: Unpack[SamplingOverrides]
    ) -> GenerationResult:
        """Say `text` and wait for the whole reply. Ctrl-C keeps the part that there is ("interrupted")."""
        stream = self.stream(text, params, **overrides)
        for _ in stream:
            pass
        return stream.result

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        if self._turn is not None:
            self._turn[1].close()
        self._turn = None
        self._settled = []

    def _settle(self) -> None:
        """Make the newest turn, ended here if need be, part of the history."""
        if self._turn is not None:
            self._turn[1].close()
            self._settled += self._newest_turn()
            self._turn = None

    def _newest_turn(self) -> list[Message]:
        if self._turn is None:
            return []
        text, stream = self._turn
        reply = stream.result.text
        return [{"role": "user", "content": text}, {"role": "assistant", "content": reply}] if reply else []

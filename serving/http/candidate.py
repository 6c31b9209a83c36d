"""One generation of a request, as far as it has come: what its chunks say to the client, and the choice it ends as."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from starling.engine.batching.request import RequestHandle
from starling.engine.generation.results import GenerationChunk, Timings
from starling.engine.generation.sampler import TokenLogprob
from starling.serving.api.prompt_echo import PromptEcho
from starling.serving.api.replies import Choice, Logprobs
from starling.serving.api.token_texts import RankedTable, ShownToken, TokenTexts
from starling.serving.api.tool_replies import ToolReader
from starling.serving.http.request_bodies import ApiRequest


class Candidate:
    """A choice of the answer, or one of those that `best_of` chooses from."""

    def __init__(
        self,
        index: int,
        handle: RequestHandle,
        request: ApiRequest,
        texts: TokenTexts,
        ends: frozenset[int],
        echo: PromptEcho | None,
    ) -> None:
        """`ends` are tokens that are no part of the text; `echo` is what it begins with."""
        self.index, self.handle, self.echo = index, handle, echo
        self._request, self._token_texts, self._ends = request, texts, ends
        #: Whether its prompt's tokens count: those of one prompt count once.
        self.counts_prompt = index % request.candidates == 0
        self._parts: list[str] = []
        #: Tokens that are part of the text, each with the offset of its own text in it.
        self._logprobs: list[ShownToken] = []
        #: Of all tokens, the end token too.
        self._log_probability = 0.0
        self.finish_reason = ""
        #: What the reward model gives it.
        self.reward: float | None = None
        self.timings: Timings | None = None
        self._offset = 0 if echo is None else len(echo.text)
        #: Whether its end is in the metrics.
        self.recorded = False
        #: Whether its first event has been written.
        self.opened = False
        self._tools: ToolReader | None = None
        if request.tools is not None and request.tool_format is not None:
            self._tools = ToolReader(request.tool_format, request.tools)

    @property
    def text(self) -> str:
        """All that was added, without what the answer begins with."""
        return "".join(self._parts)

    @property
    def merit(self) -> float:
        """What `best_of` goes by: the reward, else the mean log-probability of a token."""
        if self.reward is not None:
            return self.reward
        return self._log_probability / max(1, self.timings.new_tokens if self.timings else 1)

    def add(self, chunk: GenerationChunk) -> None:
        """Keep a chunk for `choice`."""
        self._parts.append(chunk.text)
        self._logprobs += self.logprobs(chunk) or ()
        if chunk.logprob is not None:
            self._log_probability += chunk.logprob.logprob

    def logprobs(self, chunk: GenerationChunk) -> Logprobs | None:
        """What a chunk's token is shown with; to be asked of each chunk once, in their order."""
        offset = self._offset
        self._offset += len(chunk.text)
        if self._request.params.logprobs is None:
            return None
        if chunk.logprob is None or chunk.token in self._ends:
            return []
        token = chunk.logprob.token
        return [ShownToken(self._token_texts.begin(token, chunk.text, offset), token, chunk.logprob)]

    def read(self, chunk: GenerationChunk) -> tuple[str, list[dict[str, Any]], str | None]:
        """Text, calls of tools and finish_reason of a chunk."""
        tools, reason = self._tools, chunk.finish_reason
        if tools is None:
            return chunk.text, [], reason
        text, calls = tools.deltas(chunk.text, last=reason is not None)
        return text, calls, None if reason is None else tools.finish_reason(reason)

    def opening(self) -> tuple[str, Logprobs | None]:
        """What it begins with: its prompt where `echo` repeats that, which has been run by now."""
        echo, wanted = self.echo, self._request.params.logprobs is not None
        if echo is None:
            return "", [] if wanted else None
        entries = self.handle.partial.prompt_logprobs if wanted else None
        if entries is None:
            return echo.text, None
        shown = [_with_top(entry, self._request.params.logprobs or 0) for entry in entries]
        return echo.text, [ShownToken(*each) for each in zip(echo.offsets, echo.ids, shown, strict=True)]

    def choice(self) -> Choice:
        """The whole of it, once it has ended."""
        text, logprobs = self.opening()
        if logprobs is not None:
            logprobs = [*logprobs, *self._logprobs]
        text += self.text
        reward, prompt = self.reward, self._prompt_logprobs()
        if self._tools is None:
            return Choice(text, logprobs, self.finish_reason, reward=reward, prompt=prompt)
        text, calls = self._tools.whole(text)
        return Choice(text, logprobs, self._tools.finish_reason(self.finish_reason), calls, reward, prompt)

    def _prompt_logprobs(self) -> Sequence[RankedTable | None] | None:
        """`prompt_logprobs`, where the request asks for them."""
        wanted, entries = self._request.prompt_logprobs, self.handle.partial.prompt_logprobs
        if wanted is None or entries is None:
            return None
        return self._token_texts.ranked([_with_top(entry, wanted) for entry in entries])


def _with_top(entry: TokenLogprob | None, most: int) -> TokenLogprob | None:
    """The entry with so many alternatives: `echo` and `prompt_logprobs` may ask for other numbers of them."""
    return entry if entry is None or len(entry.top) <= most else replace(entry, top=entry.top[:most])

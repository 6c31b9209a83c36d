"""Answers the entries of a batch on a ServingLoop, and writes each result as soon as it is there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from starling.engine.batching.request import RequestHandle
from starling.engine.engine import Engine
from starling.engine.errors import DeadlineExceeded, PromptError, RequestFailed, SamplingError
from starling.engine.generation.results import GenerationChunk
from starling.engine.generation.sampling_params import SamplingParams
from starling.engine.serving_loop import ServingLoop
from starling.serving.api.api_errors import ApiError
from starling.serving.api.sampling_fields import MOST_CHOICES
from starling.serving.api.token_texts import TokenTexts
from starling.serving.api.tool_fields import settings_with_tools
from starling.serving.api.tool_replies import ToolReader
from starling.serving.batch.input_lines import BadLine, Entry
from starling.serving.batch.result_lines import failure_record, result_record

Record = tuple[Entry, dict[str, Any]]

#: Nobody waits for a single token of a batch: prompts may slow it down, so that rows are filled sooner.
NO_HURRY = 8.0


def answer(
    engine: Engine,
    entries: Iterable[Entry],
    *,
    prefill_chunk: int,
    prefix_cache: int,
    on_bad_line: Callable[[BadLine], None],
) -> Iterator[list[Record]]:
    """Records in order of completion, those that are there at once together.

    As many generations wait as run, so that a row is never empty. `on_bad_line` hears of prompts that do not fit and of
    settings that this model refuses; where it returns, they are skipped. Requests that were begun are dropped when the
    iterator is closed.
    """
    most = 2 * engine.max_batch
    loop = ServingLoop(
        engine,
        queue_limit=engine.max_batch + MOST_CHOICES,  # an entry's choices wait together
        prefill_chunk=prefill_chunk,
        slowdown=NO_HURRY,
        prefix_cache=prefix_cache,
    )
    try:
        yield from _Run(engine, loop, on_bad_line).records(iter(entries), most)
    finally:
        loop.close(drain=False)


@dataclass(slots=True)
class _Running:
    """An entry whose generations have been begun."""

    entry: Entry
    handles: Sequence[RequestHandle]
    #: Read the calls of tools, one each.
    readers: Sequence[ToolReader | None]
    #: Generations that have not ended.
    left: int


class _Run:
    def __init__(self, engine: Engine, loop: ServingLoop, on_bad_line: Callable[[BadLine], None]) -> None:
        self._engine, self._loop, self._on_bad_line = engine, loop, on_bad_line
        self._ended: SimpleQueue[int] = SimpleQueue()
        self._texts = TokenTexts(engine.tokenizer)
        #: By line number.
        self._running: dict[int, _Running] = {}
        #: Generations that have not ended.
        self._left = 0

    def records(self, entries: Iterator[Entry], most: int) -> Iterator[list[Record]]:
        more = True
        while True:
            while more and self._left < most:
                entry = next(entries, None)
                more = entry is not None
                if entry is not None:
                    self._submit(entry)
            if not self._running:
                return
            ended = [self._ended.get()]
            while not self._ended.empty():
                ended.append(self._ended.get())
            if records := [self._record(running) for line in ended if (running := self._end_one(line))]:
                yield records

    def _submit(self, entry: Entry) -> None:
        def on_chunk(chunk: GenerationChunk) -> None:
            if chunk.finish_reason is not None:
                self._ended.put(entry.line)

        try:
            is_chat = entry.messages is not None
            prompt = self._prompt(entry)
            params, readers = self._with_tools(entry)
            handles = self._loop.submit_choices(
                prompt,
                params,
                entry.choices,
                deadline_s=entry.deadline_s,
                reply=is_chat,
                on_chunk=on_chunk,
                cache_salt=entry.cache_salt,
            )
        except (PromptError, SamplingError, ApiError) as error:  # what only a loaded model can tell
            self._on_bad_line(BadLine(f"line {entry.line}: {error}"))
            return
        self._running[entry.line] = _Running(entry, handles, readers, entry.choices)
        self._left += entry.choices

    def _end_one(self, line: int) -> _Running | None:
        """Note that a generation of an entry has ended; the entry, where none of it is left."""
        running = self._running[line]
        running.left -= 1
        self._left -= 1
        return None if running.left else self._running.pop(line)

    def _with_tools(self, entry: Entry) -> tuple[SamplingParams, Sequence[ToolReader | None]]:
        template = None if entry.tools is None else self._engine.chat_templates.source(entry.template)
        if entry.tools is None or template is None:
            return entry.params, [None] * entry.choices
        special = self._engine.tokenizer.special_ids_by_text
        params, known = settings_with_tools(entry.params, entry.tools, template, special)
        return params, [ToolReader(known, entry.tools) for _ in range(entry.choices)]

    def _prompt(self, entry: Entry) -> str | list[int]:
        if entry.messages is None:
            return entry.prompt
        tools = None if entry.tools is None else entry.tools.tools
        return self._engine.apply_chat_template(entry.messages, entry.template, variables=entry.variables, tools=tools)

    def _record(self, running: _Running) -> Record:
        entry = running.entry
        try:
            results = [handle.result() for handle in running.handles]
            return entry, result_record(entry, results, running.readers, self._texts)
        except (RequestFailed, DeadlineExceeded) as error:
            return entry, failure_record(entry, str(error))

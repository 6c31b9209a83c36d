"""Answers the entries of a batch on a ServingLoop, and writes each result as soon as it is there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import Any

from starling.engine.batching.request import RequestHandle
from starling.engine.engine import Engine
from starling.engine.errors import DeadlineExceeded, PromptError, RequestFailed, SamplingError
from starling.engine.generation.results import GenerationChunk
from starling.engine.generation.sampling_params import SamplingParams
from starling.engine.serving_loop import ServingLoop
from starling.serving.api.api_errors import ApiError
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

    As many requests wait as run, so that a row is never empty. `on_bad_line` hears of prompts that do not fit and of
    settings that this model refuses; where it returns, they are skipped. Requests that were begun are dropped when the
    iterator is closed.
    """
    most = 2 * engine.max_batch
    loop = ServingLoop(
        engine,
        queue_limit=engine.max_batch,
        prefill_chunk=prefill_chunk,
        slowdown=NO_HURRY,
        prefix_cache=prefix_cache,
    )
    try:
        yield from _Run(engine, loop, on_bad_line).records(iter(entries), most)
    finally:
        loop.close(drain=False)


class _Run:
    def __init__(self, engine: Engine, loop: ServingLoop, on_bad_line: Callable[[BadLine], None]) -> None:
        self._engine, self._loop, self._on_bad_line = engine, loop, on_bad_line
        self._ended: SimpleQueue[int] = SimpleQueue()
        #: By line number; the third reads the calls of tools in the answer.
        self._running: dict[int, tuple[Entry, RequestHandle, ToolReader | None]] = {}

    def records(self, entries: Iterator[Entry], most: int) -> Iterator[list[Record]]:
        more = True
        while True:
            while more and len(self._running) < most:
                entry = next(entries, None)
                more = entry is not None
                if entry is not None:
                    self._submit(entry)
            if not self._running:
                return
            ended = [self._ended.get()]
            while not self._ended.empty():
                ended.append(self._ended.get())
            yield [self._record(*self._running.pop(line)) for line in ended]

    def _submit(self, entry: Entry) -> None:
        def on_chunk(chunk: GenerationChunk) -> None:
            if chunk.finish_reason is not None:
                self._ended.put(entry.line)

        try:
            is_chat = entry.messages is not None
            prompt = self._prompt(entry)
            params, reader = self._with_tools(entry)
            handle = self._loop.submit(
                prompt,
                params,
                deadline_s=entry.deadline_s,
                reply=is_chat,
                on_chunk=on_chunk,
                cache_salt=entry.cache_salt,
            )
        except (PromptError, SamplingError, ApiError) as error:  # what only a loaded model can tell
            self._on_bad_line(BadLine(f"line {entry.line}: {error}"))
            return
        self._running[entry.line] = (entry, handle, reader)

    def _with_tools(self, entry: Entry) -> tuple[SamplingParams, ToolReader | None]:
        template = None if entry.tools is None else self._engine.chat_templates.source(entry.template)
        if entry.tools is None or template is None:
            return entry.params, None
        special = self._engine.tokenizer.special_ids_by_text
        params, known = settings_with_tools(entry.params, entry.tools, template, special)
        return params, ToolReader(known, entry.tools)

    def _prompt(self, entry: Entry) -> str | list[int]:
        if entry.messages is None:
            return entry.prompt
        tools = None if entry.tools is None else entry.tools.tools
        return self._engine.apply_chat_template(entry.messages, entry.template, variables=entry.variables, tools=tools)

    def _record(self, entry: Entry, handle: RequestHandle, reader: ToolReader | None) -> Record:
        try:
            return entry, result_record(entry, handle.result(), reader)
        except (RequestFailed, DeadlineExceeded) as error:
            return entry, failure_record(entry, str(error))

"""What a batch writes for one entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starling.engine.generation.results import GenerationResult
from starling.serving.api.replies import ChatReply, Choice, CompletionReply, usage_of
from starling.serving.api.token_texts import TokenTexts
from starling.serving.api.tool_replies import ToolReader
from starling.serving.batch.input_lines import Entry


def record_id(entry: Entry) -> str | int:
    """The `id` that an entry's record begins with."""
    return f"batch_req_{entry.fingerprint}" if entry.openai else entry.id


def result_record(
    entry: Entry, results: Sequence[GenerationResult], readers: Sequence[ToolReader | None], texts: TokenTexts
) -> dict[str, Any]:
    """The finished generations of an entry, in the form in which it came; their readers find the calls of tools."""
    choices = [_choice(result, reader) for result, reader in zip(results, readers, strict=True)]
    usage = usage_of([result.timings for result in results])
    if entry.openai:
        form = CompletionReply if entry.messages is None else ChatReply
        body = form("", texts, stream=False, with_usage=False).body(choices, usage)
        return _openai_record(entry, 200, body)
    shown = [_own_choice(choice, result) for choice, result in zip(choices, results, strict=True)]
    record: dict[str, Any] = {"id": record_id(entry)}
    record |= shown[0] if len(shown) == 1 else {"choices": [{"index": i} | each for i, each in enumerate(shown)]}
    return record | {"usage": usage.document()}


def _choice(result: GenerationResult, reader: ToolReader | None) -> Choice:
    if reader is None:
        return Choice(result.text, None, result.finish_reason)
    text, calls = reader.whole(result.text)
    return Choice(text, None, reader.finish_reason(result.finish_reason), calls)


def _own_choice(choice: Choice, result: GenerationResult) -> dict[str, Any]:
    shown: dict[str, Any] = {"text": choice.text, "finish_reason": choice.finish_reason}
    if choice.calls:
        shown["tool_calls"] = choice.calls
    if result.logprobs is not None:
        shown["logprobs"] = [
            {"token": item.token, "logprob": item.logprob, "top": [list(pair) for pair in item.top]}
            for item in result.logprobs
        ]
    return shown


def failure_record(entry: Entry, message: str) -> dict[str, Any]:
    """A request that ended without an answer: its deadline passed, or the engine failed on it."""
    if entry.openai:
        return _openai_record(entry, 500, {"error": {"message": message, "type": "server_error"}})
    return {"id": record_id(entry), "error": message}


def _openai_record(entry: Entry, status: int, body: dict[str, Any]) -> dict[str, Any]:
    response = {"status_code": status, "request_id": f"line-{entry.line}", "body": body}
    return {"id": record_id(entry), "custom_id": entry.id, "response": response, "error": None}

"""What a batch writes for one entry."""

from __future__ import annotations

from typing import Any

from starling.engine.generation.results import GenerationResult
from starling.serving.api.replies import usage_of
from starling.serving.api.tool_replies import ToolReader
from starling.serving.batch.input_lines import Entry


def record_id(entry: Entry) -> str | int:
    """The `id` that an entry's record begins with."""
    return f"batch_req_{entry.fingerprint}" if entry.openai else entry.id


def result_record(entry: Entry, result: GenerationResult, reader: ToolReader | None = None) -> dict[str, Any]:
    """A finished generation, in the form in which the entry came; `reader` finds the calls of tools in it."""
    calls: list[dict[str, Any]] = []
    text, reason = result.text, str(result.finish_reason)
    if reader is not None:
        text, calls = reader.whole(result.text)
        reason = reader.finish_reason(reason)
    if entry.openai:
        return _openai_record(entry, 200, _openai_body(entry, result, text, calls, reason))
    record: dict[str, Any] = {
        "id": record_id(entry),
        "text": text,
        "finish_reason": reason,
        "usage": usage_of(result.timings).document(),
    }
    if calls:
        record["tool_calls"] = calls
    if result.logprobs is not None:
        record["logprobs"] = [
            {"token": item.token, "logprob": item.logprob, "top": [list(pair) for pair in item.top]}
            for item in result.logprobs
        ]
    return record


def failure_record(entry: Entry, message: str) -> dict[str, Any]:
    """A request that ended without an answer: its deadline passed, or the engine failed on it."""
    if entry.openai:
        return _openai_record(entry, 500, {"error": {"message": message, "type": "server_error"}})
    return {"id": record_id(entry), "error": message}


def _openai_record(entry: Entry, status: int, body: dict[str, Any]) -> dict[str, Any]:
    response = {"status_code": status, "request_id": f"line-{entry.line}", "body": body}
    return {"id": record_id(entry), "custom_id": entry.id, "response": response, "error": None}


def _openai_body(
    entry: Entry, result: GenerationResult, text: str, calls: list[dict[str, Any]], reason: str
) -> dict[str, Any]:
    ended: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
    if entry.messages is None:
        choice = ended | {"text": text}
    else:
        message: dict[str, Any] = {"role": "assistant", "content": text}
        choice = ended | {"message": message | ({"content": text or None, "tool_calls": calls} if calls else {})}
    kind = "text_completion" if entry.messages is None else "chat.completion"
    return {"object": kind, "choices": [choice], "usage": usage_of(result.timings).document()}

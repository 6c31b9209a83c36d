"""What a batch writes for one entry."""

from __future__ import annotations

from typing import Any

from starling.engine.generation.results import GenerationResult
from starling.serving.api.replies import usage_of
from starling.serving.batch.input_lines import Entry


def record_id(entry: Entry) -> str | int:
    """The `id` that an entry's record begins with."""
    return f"batch_req_{entry.fingerprint}" if entry.openai else entry.id


def result_record(entry: Entry, result: GenerationResult) -> dict[str, Any]:
    """A finished generation, in the form in which the entry came."""
    if entry.openai:
        return _openai_record(entry, 200, _openai_body(entry, result))
    record: dict[str, Any] = {
        "id": record_id(entry),
        "text": result.text,
        "finish_reason": result.finish_reason,
        "usage": usage_of(result.timings).document(),
    }
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


def _openai_body(entry: Entry, result: GenerationResult) -> dict[str, Any]:
    ended: dict[str, Any] = {"index": 0, "finish_reason": result.finish_reason, "logprobs": None}
    if entry.messages is None:
        choice = ended | {"text": result.text}
    else:
        choice = ended | {"message": {"role": "assistant", "content": result.text}}
    kind = "text_completion" if entry.messages is None else "chat.completion"
    return {"object": kind, "choices": [choice], "usage": usage_of(result.timings).document()}

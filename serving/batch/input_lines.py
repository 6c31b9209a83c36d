"""The lines of a batch's input: one request each, in our own form or in OpenAI's batch format."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from starling.engine.errors import UserError, one_line, shown
from starling.engine.generation.sampling_params import SamplingParams
from starling.serving.api.api_errors import ApiError, bad_field
from starling.serving.api.fields import Fields
from starling.serving.api.messages import TEMPLATE_FIELDS, read_messages, read_template_variables
from starling.serving.api.sampling_fields import (
    MOST_LOGPROBS,
    SAMPLING_FIELDS,
    read_cache_salt,
    read_choices,
    read_deadline,
    read_sampling,
)
from starling.serving.api.tool_fields import TOOL_FIELDS, ToolUse, read_tools
from starling.serving.batch.input_source import LONGEST_LINE, Source

_OWN = SAMPLING_FIELDS | {"id", "prompt", "messages", "template", "logprobs", "n", "cache_salt"}
_OWN |= TEMPLATE_FIELDS | TOOL_FIELDS
_OPENAI = frozenset({"custom_id", "method", "url", "body"})
#: What a body in OpenAI's format may say besides.
_BODY = _OWN | {"model", "stream", "top_logprobs", "user", "metadata", "store"}


class BadLine(UserError):
    """A line of the input that is no request."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One request of a batch. It has either a `prompt` or chat `messages`."""

    id: str | int
    #: Number of its line in the input, from 1.
    line: int
    #: Hex digest of what the answer depends on; a result is valid as long as it is the same.
    fingerprint: str
    params: SamplingParams
    #: Answers to it; of its seed the i-th has the seed plus i.
    choices: int
    deadline_s: float | None
    prompt: str | list[int]
    messages: list[dict[str, Any]] | None
    template: str | None
    #: What goes to the template as it is.
    variables: dict[str, Any]
    #: The tools that a chat's answer may call.
    tools: ToolUse | None
    #: Known prefixes are shared among entries of the same salt alone.
    cache_salt: str
    #: Whether it came in OpenAI's batch format, and gets its answer in that.
    openai: bool


@dataclass(frozen=True, slots=True)
class EntryReader:
    """Reads entries. `defaults` are sampling settings for lines that do not name them, `salt` stands for the bundle."""

    defaults: Mapping[str, Any]
    salt: str
    #: Called for each bad line; where it returns, the line is skipped.
    on_bad_line: Callable[[BadLine], None]

    def read(self, source: Source) -> Iterator[Entry]:
        """The entries of an input. Raises UserError where it cannot be read."""
        seen: dict[str, int] = {}
        for number, line in enumerate(source.lines(), 1):
            if line.strip():
                yield from self._entry(source.name, number, line, seen)

    def _entry(self, name: str, number: int, line: bytes, seen: dict[str, int]) -> Iterator[Entry]:
        try:
            entry = self.parse(line, number)
            first = seen.setdefault(str(entry.id), number)
            if first != number:
                raise bad_field("id", f"the id {shown(entry.id)} is that of line {first}: ids must differ")
        except ApiError as error:
            self.on_bad_line(BadLine(f"{name}, line {number}: {error.message}"))
            return
        yield entry

    def parse(self, line: bytes | str, number: int) -> Entry:
        """One line. Raises ApiError, which names the field."""
        document = _object(line)
        openai = "body" in document or "custom_id" in document
        fields = Fields(document)
        if not openai:
            fields.refuse_unknown(_OWN)
            return self._make(fields, _id(fields, "id", number), number, openai=False, chat="messages" in fields.values)
        fields.refuse_unknown(_OPENAI)
        url = fields.required("url", str)
        if url not in ("/v1/completions", "/v1/chat/completions"):
            raise bad_field("url", f"url is {shown(url)}: give /v1/completions or /v1/chat/completions")
        body = Fields(fields.required("body", dict))
        body.refuse_unknown(_BODY)
        body.only("stream", False, why="a batch does not stream")
        body.only("logprobs", False, why="a batch in OpenAI's format gives none")
        return self._make(body, _id(fields, "custom_id", number), number, openai=True, chat="chat" in url)

    def _make(self, fields: Fields, id_: str | int, number: int, *, openai: bool, chat: bool) -> Entry:
        if chat and "prompt" in fields.values:
            raise bad_field("prompt", "prompt and messages are both given: choose one")
        messages = read_messages(fields) if chat else None
        prompt = "" if chat else _prompt(fields)
        logprobs = None if openai else fields.optional("logprobs", int)
        if logprobs is not None and not 0 <= logprobs <= MOST_LOGPROBS:
            raise bad_field("logprobs", f"logprobs is {shown(logprobs)}: give 0 to {MOST_LOGPROBS}")
        choices = read_choices(fields)
        defaults = dict(self.defaults)
        params = read_sampling(fields, defaults, max_tokens=defaults.pop("max_tokens"), logprobs=logprobs)
        template, variables = fields.optional("template", str), read_template_variables(fields)
        tools = _tools(fields, chat)
        said: list[Any] = [prompt, messages, template, *([variables] if variables else [])]
        said += [] if tools is None else [[list(tools.tools), sorted(tools.names), tools.must_call, tools.parallel]]
        said += [] if choices == 1 else [{"n": choices}]
        meaning = json.dumps([self.salt, *said, str(params)], ensure_ascii=True)
        return Entry(
            id=id_,
            line=number,
            fingerprint=hashlib.sha256(meaning.encode()).hexdigest()[:16],
            params=params,
            choices=choices,
            deadline_s=read_deadline(fields),
            prompt=prompt,
            messages=messages,
            template=template,
            variables=variables,
            tools=tools,
            cache_salt=read_cache_salt(fields),
            openai=openai,
        )


def _tools(fields: Fields, chat: bool) -> ToolUse | None:
    given = sorted(TOOL_FIELDS & fields.values.keys())
    if given and not chat:
        raise bad_field(given[0], f"{given[0]} is about chats: give messages in place of a prompt")
    return read_tools(fields)


def _object(line: bytes | str) -> dict[str, Any]:
    if len(line) > LONGEST_LINE:
        raise ApiError(400, f"it is longer than {LONGEST_LINE:,} bytes: split it")
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"it is not JSON in UTF-8 ({one_line(error)})") from None
    if not isinstance(document, dict):
        raise ApiError(400, f"it is a JSON {type(document).__name__}: write an object with prompt or messages")
    return document


def _id(fields: Fields, name: str, number: int) -> str | int:
    """The line's own id, or its number."""
    value = fields.values.get(name, number)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise bad_field(name, f"{name} is {shown(value)}: give a string or a whole number")
    return value


def _prompt(fields: Fields) -> str | list[int]:
    value = fields.values.get("prompt")
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(type(token) is int for token in value):
        return value
    raise bad_field("prompt", "there is neither a prompt (text or token ids) nor messages")

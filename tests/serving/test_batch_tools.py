"""Lines of `starling batch` with tools: calls are forced, read and written as over HTTP; and their cache_salt."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from command_line import refusal, succeed
from tool_bundle import with_template

pytestmark = pytest.mark.slow

COLOR = {"type": "object", "properties": {"name": {"enum": ["red", "blue"]}}, "required": ["name"]}
COLOR["additionalProperties"] = False
TOOLS = [{"type": "function", "function": {"name": "paint", "parameters": COLOR}}]
ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "Paint it."}], "max_tokens": 200, "seed": 3}
FIT = ("--max-seq", "1024", "--threads", "2")


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_template(tiny_bundle, tmp_path_factory.mktemp("tools") / "bundle")


def answered(bundle: Path, folder: Path, *lines: dict[str, Any]) -> list[dict[str, Any]]:
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    succeed("batch", bundle, folder / "in.jsonl", folder / "out.jsonl", *FIT)
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def check(call: dict[str, Any]) -> None:
    assert (call["type"], call["function"]["name"]) == ("function", "paint")
    assert call["id"].startswith("call_")
    jsonschema.validate(json.loads(call["function"]["arguments"]), COLOR)


def test_required_calls_are_in_both_forms_of_results(bundle: Path, tmp_path: Path) -> None:
    wanted = ASKED | {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "temperature": 1}
    openai = {"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": wanted}
    own, theirs = sorted(
        answered(bundle, tmp_path, {"id": "a", "cache_salt": "mine", **wanted}, openai), key=lambda one: str(one["id"])
    )
    assert (own["id"], own["finish_reason"], own["text"]) == ("a", "tool_calls", "")
    [call] = own["tool_calls"]
    check(call)
    [choice] = theirs["response"]["body"]["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    [call] = choice["message"]["tool_calls"]
    check(call)


def test_without_a_call_nothing_is_added(bundle: Path, tmp_path: Path) -> None:
    [plain] = answered(bundle, tmp_path, ASKED | {"tools": TOOLS, "tool_choice": "none", "max_tokens": 3})
    assert "tool_calls" not in plain


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"prompt": "a", "tools": TOOLS}, "tools is about chats: give messages in place of a prompt"),
        (ASKED | {"tools": [5]}, "tools[0].type is None: only function is known"),
        (ASKED | {"tools": TOOLS, "guided_regex": "a"}, "guided_regex says what the answer must look like"),
        (ASKED | {"cache_salt": "x" * 257}, "cache_salt has 257 characters: give at most 256"),
    ],
)
def test_bad_tools_are_a_bad_line(bundle: Path, tmp_path: Path, line: dict[str, Any], problem: str) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps(line) + "\n")
    told = refusal("batch", bundle, tmp_path / "in.jsonl", tmp_path / "out.jsonl", *FIT)
    assert "line 1" in told
    assert problem in told


def test_a_template_that_knows_no_tools_is_a_bad_line(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps(ASKED | {"tools": TOOLS}) + "\n")
    told = refusal("batch", tiny_bundle, tmp_path / "in.jsonl", tmp_path / "out.jsonl", *FIT)
    assert "line 1: this model's chat template knows no tools" in told

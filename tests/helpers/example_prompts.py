"""The prompts that documents and help texts suggest for the demo model, read where they stand."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import click
from document_blocks import ROOT, Block, blocks_of, documents

from starling.cli.command_group import COMMANDS
from starling.cli.command_group import starling as main_command

#: Files beside the documents that show prompts.
OTHERS = ("Makefile", "serving/triton/templates/README.md")
CODE = ("cli", "engine", "serving")
_NEXT = re.compile(r'(?:next: starling generate \S+|EXAMPLE_PROMPT =) "([^"{]+)"')
_DATA = re.compile(r"""-d '(\{.*?\})'""", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt that is answered greedily: as it is, or as the turn of a chat after the turns `before`."""

    prompt: str
    chat: bool = True
    before: tuple[str, ...] = ()
    system: str | None = None


def documented_examples() -> dict[Example, list[str]]:
    """Every example with the places that show it. What is sampled, or not for the demo model, is left out."""
    found: dict[Example, list[str]] = {}
    for place, example in _everywhere():
        found.setdefault(example, []).append(place)
    return found


def _everywhere() -> Iterator[tuple[str, Example]]:
    for path in [*documents(), *(ROOT / name for name in OTHERS)]:
        text = path.read_text()
        name = str(path.relative_to(ROOT))
        yield from ((name, example) for line in _commands(text) for example in _of_command(line))
        yield from ((name, example) for data in _DATA.findall(text) for example in _of_request(json.loads(data)))
        yield from ((block.place, example) for block in blocks_of(path) for example in _of_block(block))
    for path in (path for room in CODE for path in sorted((ROOT / room).rglob("*.py"))):
        name, text = str(path.relative_to(ROOT)), path.read_text()
        yield from ((name, Example(prompt)) for prompt in _NEXT.findall(text))
        yield from ((block.place, example) for block in blocks_of(path) for example in _of_block(block))
    for name, text in help_texts().items():
        yield from ((name, example) for line in _commands(text) for example in _of_command(line))
        yield from ((name, example) for data in _DATA.findall(text) for example in _of_request(json.loads(data)))


def help_texts() -> dict[str, str]:
    """The help of every command, by its name."""
    commands = {name: import_module(f"starling.cli.{name}").command for name in COMMANDS}
    return {"starling --help": main_command.help or ""} | {
        f"starling {name} --help": command.help or "" for name, command in commands.items()
    }


def parsed(words: list[str]) -> dict[str, Any]:
    """The parameters of `starling WORDS…` by the command's own parser. Raises click.UsageError."""
    command: click.Command = import_module(f"starling.cli.{words[0]}").command
    return command.make_context(words[0], words[1:], obj=None).params


def _commands(text: str) -> list[list[str]]:
    """The words after `starling` of every `starling generate …` in a text."""
    lines = re.findall(r"(?:^|[\s/])starling (generate [^\n]*)", text)
    return [shlex.split(line, comments=True) for line in lines if "{" not in line]


def _of_command(words: list[str]) -> Iterator[Example]:
    parameters = parsed(words)
    if parameters["temperature"] or "starling" in str(parameters["bundle"]):
        return
    for prompt in parameters["prompts"]:
        if prompt != "-":
            yield Example(prompt, chat=parameters["chat"] is not False, system=parameters["system"])


def _of_request(request: dict[str, Any]) -> Iterator[Example]:
    """The example of a body that is sent to the HTTP API or to Triton."""
    if request.get("temperature"):
        return
    for field in ("prompt", "text_input"):
        if isinstance(request.get(field), str):
            yield Example(request[field], chat=False)
    yield from _of_messages(request.get("messages"))


def _of_messages(messages: Any) -> Iterator[Example]:
    if messages:
        system = next((one["content"] for one in messages if one["role"] == "system"), None)
        said = [one["content"] for one in messages if one["role"] == "user"]
        yield Example(said[-1], before=tuple(said[:-1]), system=system)


def _of_block(block: Block) -> Iterator[Example]:
    """The examples of a Python block: `generate`, `stream`, `send` with a text, and `messages`."""
    if block.language != "python":
        return
    said: list[str] = []
    system: str | None = None
    calls = [node for node in ast.walk(ast.parse(block.text)) if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda node: (node.lineno, node.col_offset)):
        named = {word.arg: word.value for word in call.keywords}
        if "messages" in named:
            yield from _of_messages(ast.literal_eval(named["messages"]))
        if "system" in named:
            system = ast.literal_eval(named["system"])
        if not isinstance(call.func, ast.Attribute) or not call.args or not isinstance(call.args[0], ast.Constant):
            continue
        text, method = call.args[0].value, call.func.attr
        if not isinstance(text, str) or "temperature" in named:
            continue
        of_chat = isinstance(call.func.value, ast.Name) and call.func.value.id == "chat"
        if method == "send" or (of_chat and method == "stream"):
            yield Example(text, before=tuple(said), system=system)
            said.append(text)
        elif method in ("generate", "stream", "submit"):
            yield Example(text, chat=False)

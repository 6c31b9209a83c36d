"""How models write calls of tools: the forms that are known, and which of them a chat template is written for.

A template says it itself: it writes the calls of earlier turns, or describes the form to the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

#: objects: each call is a JSON object between two marks. list: a JSON list of such objects follows a mark. named: after
#: a mark the name, another mark, the arguments. answer: the whole answer is a JSON object. braces: Gemma's notation.
Style = Literal["objects", "list", "named", "answer", "braces"]


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One form of calls. Marks are texts; whether they are special tokens is for the tokenizer to say."""

    name: str
    style: Style
    #: What a call begins with, and what it ends with; "" where nothing ends it.
    begin: str
    end: str = ""
    #: Between name and arguments (named), or around a string (braces).
    mark: str = ""
    #: Key of the arguments in a call's object.
    arguments: str = "arguments"
    #: Further marks that the answer may have and that mean nothing here.
    others: tuple[str, ...] = ()
    #: Characters of a call's id: Mistral's templates refuse others.
    id_length: int = 24

    @property
    def marks(self) -> tuple[str, ...]:
        """All marks: where they are special tokens, the answer's text must show them."""
        return tuple(mark for mark in (self.begin, self.end, self.mark, *self.others) if mark)

    @property
    def is_json(self) -> bool:
        """Whether arguments are JSON, which a grammar of a schema can describe."""
        return self.style != "braces"


HERMES = ToolFormat("hermes", "objects", "<tool_call>", "</tool_call>")
MISTRAL_LIST = ToolFormat("mistral", "list", "[TOOL_CALLS]", id_length=9)
MISTRAL_NAMED = ToolFormat("mistral-args", "named", "[TOOL_CALLS]", mark="[ARGS]", others=("[CALL_ID]",), id_length=9)
LLAMA3 = ToolFormat("llama3", "answer", "<|python_tag|>", arguments="parameters")
FUNCTION_GEMMA = ToolFormat("functiongemma", "braces", "<start_function_call>", "<end_function_call>", mark="<escape>")
GEMMA4 = ToolFormat("gemma4", "braces", "<|tool_call>", "<tool_call|>", mark='<|"|>')

#: What a template's text must have for each, and must not have; the first that fits.
_TEMPLATES: tuple[tuple[ToolFormat, tuple[str, ...], tuple[str, ...]], ...] = (
    (FUNCTION_GEMMA, ("<start_function_call>", "<escape>"), ()),
    (GEMMA4, ("<|tool_call>", "<tool_call|>", '<|"|>'), ()),
    (MISTRAL_NAMED, ("[TOOL_CALLS]", "[ARGS]"), ()),
    (MISTRAL_LIST, ("[TOOL_CALLS]",), ()),
    # Others write XML between the same marks: a parameter each, with a tag of its own.
    (HERMES, ("<tool_call>", "</tool_call>"), ("<function=", "<arg_key>")),
    (LLAMA3, ("ipython", '"parameters": '), ()),
    (LLAMA3, ("<|python_tag|>",), ()),
)
_TOOLS = re.compile(r"\btools\b")


def format_of(template: str) -> ToolFormat | None:
    """The form of calls that a chat template, given as Jinja's source, is written for; None for one not known."""
    if not knows_tools(template):
        return None
    for known, present, absent in _TEMPLATES:
        if all(mark in template for mark in present) and not any(mark in template for mark in absent):
            return known
    return None


def knows_tools(template: str) -> bool:
    """Whether a chat template says anything about tools."""
    return _TOOLS.search(template) is not None


def marks_shown(known: ToolFormat, special: Mapping[str, int]) -> tuple[str, ...]:
    """The marks that are special tokens, `special` by their texts: the text of an answer leaves those out."""
    return tuple(mark for mark in known.marks if mark in special)


def names_of(tools: Sequence[Mapping[str, object]]) -> frozenset[str]:
    """The names of functions in OpenAI's form."""
    functions = (tool["function"] for tool in tools)
    return frozenset(str(function["name"]) for function in functions if isinstance(function, Mapping))

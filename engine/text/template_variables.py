"""Variables that a client hands to the chat template, such as `enable_thinking`: what they may be called and hold."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from starling.engine.errors import PromptError, shown

#: The field of a request that they come in.
FIELD = "chat_template_kwargs"
#: Names that a template gets from elsewhere: what is said, by whom, and what the template may call.
RESERVED = frozenset(
    {
        *("messages", "tools", "tool_choice", "documents", "add_generation_prompt", "continue_final_message"),
        *("chat_template", "tokenize", "raise_exception", "strftime_now", "range", "dict", "lipsum", "cycler"),
        *("joiner", "namespace", "self", "loop", "caller", "varargs", "kwargs"),
    }
)
#: Of one request: variables, characters of a name, bytes of all as JSON, and lists and objects within each other.
MOST_VARIABLES, LONGEST_NAME, MOST_BYTES, DEEPEST = 64, 64, 2**16, 16


def check_variables(variables: Mapping[str, Any], special_tokens: Collection[str]) -> None:
    """Raise PromptError for what a template may not be given: a reserved name, a special token's, no plain JSON.

    `special_tokens` are the names under which the template knows them (`bos_token`).
    """
    if len(variables) > MOST_VARIABLES:
        raise _refused(f"{FIELD} has {len(variables)} variables: give at most {MOST_VARIABLES}")
    for name, value in variables.items():
        if not isinstance(name, str) or not name.isidentifier() or len(name) > LONGEST_NAME or name.startswith("_"):
            raise _refused(f"{FIELD} has the name {shown(name)}: give letters, digits and _, a letter first")
        if name in RESERVED or name in special_tokens:
            raise _refused(f"{FIELD} has {name!r}, which the server gives to the template itself: leave it out")
        _check_value(name, value)
    try:
        size = len(json.dumps(variables))
    except ValueError as error:  # an integer of thousands of digits
        raise _refused(f"{FIELD} is no plain JSON: {error}") from None
    if size > MOST_BYTES:
        raise _refused(f"{FIELD} has {size:,} bytes: give at most {MOST_BYTES:,}")


def _check_value(name: str, value: Any) -> None:
    """Without recursion: what is nested deeply is refused before anything walks through it."""
    level = [value]
    for _ in range(DEEPEST + 1):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, Mapping):
                if not all(isinstance(key, str) for key in item):
                    raise _refused(f"{FIELD}.{name} has a key that is no string: give JSON")
                inner += item.values()
            elif isinstance(item, list | tuple):
                inner += item
            elif isinstance(item, float) and not math.isfinite(item):
                raise _refused(f"{FIELD}.{name} has the number {item}, which JSON does not have")
            elif item is not None and not isinstance(item, str | bool | int | float):
                raise _refused(f"{FIELD}.{name} has a {type(item).__name__}: give JSON values")
        if not inner:
            return
        level = inner
    raise _refused(f"{FIELD}.{name} is nested more than {DEEPEST} deep: give less")


def _refused(problem: str) -> PromptError:
    return PromptError(problem, field=FIELD)

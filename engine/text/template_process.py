"""The process that runs chat templates: a checkpoint's own code, which may loop, or take any amount of memory.

It is started as a script, with nothing of Starling's, and reads one job a line from stdin, as JSON: {"source"} to
compile a template, or {"source", "scope", "most"} to render it. Each gets one line back: {"text"}, {"syntax": [line,
message]}, {"refused": message}, {"too_long": characters}. A job that takes longer than it may ends the process.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

if __name__ == "__main__":
    sys.path += sys.argv[3:]  # where Jinja is; it was started without any folder but Python's own

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

#: Characters of an error's message: a template may raise one as long as it likes.
MOST_OF_A_MESSAGE = 1000


class _GenerationTag(Extension):
    """`{% generation %}` marks what to train on; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up for chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Unlike Jinja's own filter it does not escape HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


_ENVIRONMENT = _environment()
_compiled = lru_cache(maxsize=32)(_ENVIRONMENT.from_string)


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """The answer to one job."""
    try:
        template = _compiled(job["source"])
        if "scope" not in job:
            return {"text": ""}
        text = template.render(job["scope"])
    except jinja2.TemplateSyntaxError as error:
        return {"syntax": [error.lineno, (error.message or "")[:MOST_OF_A_MESSAGE]]}
    except MemoryError:
        return {"refused": "it takes too much memory"}
    # A template may raise anything on messages that it was not written for.
    except Exception as error:
        known = isinstance(error, jinja2.TemplateError | TypeError | ValueError | LookupError | ArithmeticError)
        message = str(error) if known and str(error) else f"{type(error).__name__} {error}".strip()
        return {"refused": message[:MOST_OF_A_MESSAGE]}
    return {"text": text} if len(text) <= job["most"] else {"too_long": len(text)}


def main(seconds: float, memory: int) -> None:
    """Answer jobs until stdin ends, each within so many seconds and bytes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started this process
    _limit_memory(memory)
    # The descriptors, so that no template finds a file object; a line is answered before the next is read.
    jobs, answers, nowhere = os.fdopen(0, "rb"), os.fdopen(1, "wb"), open(os.devnull, "w")  # noqa: SIM115
    for line in jobs:
        # It ends the process from a thread of C's: also while one operation of Python's goes on for ever.
        faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
        try:
            said = json.dumps(answer(json.loads(line)))
        except MemoryError:
            said = json.dumps({"refused": "it takes too much memory"})
        answers.write(said.encode() + b"\n")
        answers.flush()
        faulthandler.cancel_dump_traceback_later()


def _limit_memory(size: int) -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    except (ImportError, ValueError, OSError):
        # Windows has none, macOS none that holds: the time is limited all the same.
        pass


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))

"""Results as they come: a line of JSON each, on stdout and in a file, so that nothing is lost when time is over."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

FILE = "results.jsonl"
_MOST_MESSAGE = 500


@dataclass(slots=True)
class Results:
    """Lines of one stage, appended to `path`."""

    path: Path
    stage: str
    begin: float = field(default_factory=perf_counter)

    def write(self, **fields: Any) -> None:
        """A result, after the stage's name and the seconds since its begin."""
        line = json.dumps({"stage": self.stage, "at_s": round(perf_counter() - self.begin, 1), **fields})
        print(line, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    @contextmanager
    def guarded(self, **what: Any) -> Iterator[None]:
        """A failure inside is a result too: it is written down, with `what` was tried, and the stage goes on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc(limit=4)
            self.write(**what, failed=f"{type(error).__name__}: {error}"[:_MOST_MESSAGE])


def read_results(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, in their order; what a process that was ended left unfinished is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines

"""The code blocks of the documents, and the marks that say which of them no test can run.

A mark is an HTML comment above the block's fence, which GitHub does not show:

    <!-- not run: needs a GPU -->                              the whole block
    <!-- not run, "--backend tensorrt": needs a GPU -->        the commands that have this text in them
    <!-- run apart: half an hour of downloads -->              run with `pytest -m install` only
    <!-- form of: answers.jsonl -->                            JSON with the names and types of that file's first line

Commands that install something are apart without a mark.
"""

from __future__ import annotations

import re
import subprocess
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parents[2]
RUN_LANGUAGES = ("sh", "console", "python", "json")
Fate = Literal["run", "apart", "not run"]

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
_MARKS = re.compile(r"(?:<!--[^>]*-->\s*)+\Z")
_MARK = re.compile(r'<!--\s*(not run|run apart)(?:, "([^"]+)")?: (.+?)\s*-->', re.DOTALL)
_SHOWS = re.compile(r"<!--\s*form of: (\S+)\s*-->")
_INSTALLS = re.compile(
    r"\b(pip3? (install|wheel)|uv (pip|venv|sync)|make (demo|test|install|dist)|apt(-get)? install|git clone|venv)\b"
)
_ACTIVATES = re.compile(r"^(\.|source) \S+/bin/activate$")


@dataclass(frozen=True, slots=True)
class Mark:
    """What is not run with the others, and why; `text` None: the whole block."""

    fate: Fate
    text: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class Command:
    """A command of a block, with its continuation lines, and the lines that the document shows as its output."""

    text: str
    output: str = ""


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block. `line` is that of its fence, from 1."""

    document: str
    line: int
    language: str
    text: str
    marks: tuple[Mark, ...] = ()
    #: The file whose first line a `json` block has the form of.
    shows: str | None = None

    @property
    def place(self) -> str:
        """Where the block is, for messages."""
        return f"{self.document}:{self.line}"

    def commands(self) -> list[Command]:
        """The commands of a `sh` or `console` block in their order; any other block is one command."""
        if self.language == "sh":
            return [Command(text) for text in _complete(self.text.splitlines())]
        if self.language == "console":
            return _console(self.text)
        return [Command(self.text)]

    def fate(self, command: Command) -> tuple[Fate, str]:
        """Whether the command is run with the others, and if not, why."""
        for mark in sorted(self.marks, key=lambda mark: mark.text is None):  # the narrower one first
            if mark.text is None or mark.text in command.text:
                return mark.fate, mark.reason
        if self.language in ("sh", "console") and (_INSTALLS.search(command.text) or _ACTIVATES.match(command.text)):
            return "apart", "installs"
        return "run", ""

    def check(self) -> None:
        """Fail where a mark names a text that no command has."""
        texts = [command.text for command in self.commands()]
        for mark in self.marks:
            assert mark.text is None or any(mark.text in text for text in texts), (
                f"{self.place}: the mark names {mark.text!r}, which no command of the block has"
            )


def documents() -> list[Path]:
    """README.md and the pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks_of(path: Path) -> list[Block]:
    """Every fenced block of a file in its order; those of docstrings too."""
    text = path.read_text()
    name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
    return [_block(name, text, found) for found in _FENCE.finditer(text)]


def _block(name: str, text: str, found: re.Match[str]) -> Block:
    above = _MARKS.search(text[: found.start()])
    comments = above[0] if above else ""
    shows = _SHOWS.search(comments)
    line = text.count("\n", 0, found.start()) + 1
    return Block(
        name, line, found["language"], textwrap.dedent(found["text"]), _marks(name, comments), shows and shows[1]
    )


def _marks(name: str, comments: str) -> tuple[Mark, ...]:
    found = [
        Mark("apart" if match[1] == "run apart" else "not run", match[2], " ".join(match[3].split()))
        for match in _MARK.finditer(comments)
    ]
    meant = re.findall(r"<!--\s*(?:not run|run apart)\b", comments)
    assert len(found) == len(meant), f"{name}: a mark is not of the form <!-- not run: reason -->: {comments.strip()}"
    return tuple(found)


def _console(text: str) -> list[Command]:
    """Commands after `$ `, each with the lines after it as output."""
    commands: list[Command] = []
    lines = text.splitlines()
    while lines:
        line = lines.pop(0)
        if not line.startswith("$ "):
            commands[-1] = Command(commands[-1].text, commands[-1].output + line + "\n")
            continue
        parts = [line[2:]]
        while not _is_complete("\n".join(parts)) and lines:
            parts.append(lines.pop(0))
        commands.append(Command("\n".join(parts)))
    return commands


def _complete(lines: list[str]) -> list[str]:
    """Lines joined to whole commands, without those that are empty or a comment."""
    commands: list[str] = []
    parts: list[str] = []
    for line in lines:
        if not parts and (not line.strip() or line.lstrip().startswith("#")):
            continue
        parts.append(line)
        if _is_complete("\n".join(parts)):
            commands.append("\n".join(parts))
            parts = []
    assert not parts, f"a command has no end: {parts}"
    return commands


def _is_complete(text: str) -> bool:
    """Whether bash would run the command at this line's end: no open quote, bracket, loop, here-document or `\\`."""
    if text.endswith("\\"):
        return False
    finished = subprocess.run(["bash", "-n"], input=text + "\n", capture_output=True, text=True, check=False)
    return finished.returncode == 0 and "here-document" not in finished.stderr

"""docs/command-line.md lists every environment variable that the code reads or sets, and no other as its own."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from starling.cli.command_group import COMMANDS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "command-line.md"
FOLDERS = ("cli", "engine", "export", "profiling", "serving")
#: A variable's name, and one that can be nothing else.
NAME, SURE = re.compile(r"[A-Z][A-Z0-9_]{4,}"), re.compile(r"(STARLING|HF|XDG|CUDA|RAY)_[A-Z0-9_]+")
#: Strings of those modules that are spelt like a variable: metavars, a type of Triton's, and names of sysconf.
OTHER_WORDS = {"PATTERN", "ORIGIN", "STRING", "SC_PAGE_SIZE", "SC_PHYS_PAGES"}
#: In C++, and with or without a default in a shell script.
GETENV = re.compile(r'getenv\("(\w+)"\)')
EXPANSION = re.compile(r"\$\{([A-Z_]+):?[-+?]")


def source_files(*patterns: str) -> list[Path]:
    return [ROOT / "setup.py", *(file for room in FOLDERS for each in patterns for file in (ROOT / room).rglob(each))]


def names_in_python(file: Path) -> set[str]:
    """The strings of a module that are spelt like a variable, if it has to do with os.environ; sure ones of any."""
    text = file.read_text(encoding="utf-8")
    pattern = NAME if re.search(r"\benviron\b", text) else SURE
    constants = (node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant))
    return {value for value in constants if isinstance(value, str) and pattern.fullmatch(value)} - OTHER_WORDS


def names_in_source() -> set[str]:
    python = set().union(*(names_in_python(file) for file in source_files("*.py")))
    text = {file: file.read_text(encoding="utf-8") for file in source_files("*.cpp", "*.h", "*.sh")}
    native = {name for content in text.values() for name in GETENV.findall(content)}
    scripts = {name for file, content in text.items() if file.suffix == ".sh" for name in EXPANSION.findall(content)}
    return python | native | scripts


def table(heading: str) -> Iterator[str]:
    """The variables in the first column of the table under a heading."""
    section = re.split(r"\n###? ", PAGE.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2])[0]
    for line in section.splitlines():
        if line.startswith("| `"):
            yield from re.findall(r"`([A-Z_]+)", line.split("|")[1])


def test_the_page_lists_what_the_code_reads_and_sets() -> None:
    listed = list(table("Environment variables"))
    assert len(listed) == len(set(listed))
    assert set(listed) == names_in_source()


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ('import os\nlevel = os.environ.get("STARLING_NEW_SWITCH", "")', "STARLING_NEW_SWITCH"),
        ('import os\nNAME = "OTHERNAME"\nos.environ[NAME] = "1"', "OTHERNAME"),
        ('KEY = "STARLING_OTHER_KEY"\ndef read(environment): return environment[KEY]', "STARLING_OTHER_KEY"),
    ],
)
def test_a_variable_in_the_code_is_noticed(line: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "new.py").write_text(line)
    assert names_in_python(tmp_path / "new.py") == {name}


def test_the_page_lists_every_command_once() -> None:
    commands = re.findall(r"^\| `(\w+)[^`]*` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert tuple(name for name in commands if name in COMMANDS) == COMMANDS

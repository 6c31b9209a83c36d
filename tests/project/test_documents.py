"""Every command block of README.md and docs/ is run as it stands, or says in a mark why not.

The blocks of a document run in its order in one folder. What installs something, or takes minutes, runs apart, by
`pytest -m install`. document_blocks.py has the marks, document_runner.py what is done differently from a reader.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
import triton_server
from command_line import copy_bundle
from document_blocks import ROOT, RUN_LANGUAGES, Block, Command, Fate, blocks_of, documents
from document_runner import Reader, reading
from example_prompts import help_texts, parsed

pytestmark = pytest.mark.slow

README, *PAGES = documents()
NOT_RUN = Path(__file__).parents[1] / "data" / "blocks_not_run.txt"
#: The README's export, which its test makes as it is written.
WRITTEN = ("demo", "--quant", "int8")
#: What the other documents go on with, by the arguments of `starling export`.
NAMES = {WRITTEN: ("smollm2", "smollm2-int8"), ("demo",): ("smollm2-fp32",)}
Exported = dict[tuple[str, ...], Path]


@pytest.fixture(scope="module")
def exported(demo_bundle: Path, demo_int8_bundle: Path) -> Exported:
    """The bundles that the tests have, by the arguments of `starling export` that make them."""
    return {("demo",): demo_bundle, WRITTEN: demo_int8_bundle}


def test_the_commands_of_the_readme_run(tmp_path: Path, exported: Exported) -> None:
    folder = tmp_path / "folder"
    others = {arguments: bundle for arguments, bundle in exported.items() if arguments != WRITTEN}
    with reading(folder, tmp_path / "notes", made=_maker(others, tmp_path)) as reader:
        _run(README, reader, "run")
    # What was exported here as it is written is, to the byte, what the other documents are given.
    assert _sums(folder / _exports(README)[WRITTEN]) == _sums(exported[WRITTEN])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_run_after_those_of_the_readme(page: Path, tmp_path: Path, exported: Exported) -> None:
    with reading(tmp_path / "folder", tmp_path / "notes", made=_maker(exported, tmp_path)) as reader:
        _place_bundles(exported, reader.folder)
        _run(page, reader, "run")


@pytest.mark.install
@pytest.mark.parametrize("document", [README, *PAGES], ids=lambda path: path.name)
def test_what_a_document_installs_installs(document: Path, tmp_path: Path) -> None:
    if not any(reason == "installs" for _, _, reason in _commands("apart", [document])):
        pytest.skip("it installs nothing")
    fresh = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", fresh], check=True)
    _copy_checkout(tmp_path / "folder")
    env = {"PYTHONPATH": "", "PIP_CONSTRAINT": str(ROOT / "constraints.txt"), "VIRTUAL_ENV": str(fresh)}
    with reading(tmp_path / "folder", tmp_path / "notes", programs=fresh / "bin", env=env) as reader:
        _run(document, reader, "apart", only="installs")


@pytest.mark.install
@pytest.mark.parametrize("document", [README, *PAGES], ids=lambda path: path.name)
def test_what_takes_minutes_runs(document: Path, tmp_path: Path, exported: Exported) -> None:
    if all(reason == "installs" for _, _, reason in _commands("apart", [document])):
        pytest.skip("nothing takes minutes")
    with reading(tmp_path / "folder", tmp_path / "notes", made=_maker(exported, tmp_path)) as reader:
        _place_bundles(exported, reader.folder)
        _run(document, reader, "apart", but="installs")


def test_what_is_not_run_is_what_the_list_says() -> None:
    """The list is for reviewers of a change: what no test runs may not grow unseen."""
    listed = NOT_RUN.read_text()
    found = "".join(f"{line}\n" for line in sorted(_listing()))
    assert found == listed, f"{NOT_RUN} would have to be:\n{found}"


def test_every_documented_command_line_is_one_that_the_parser_takes() -> None:
    """Those that are not run too, and the examples of every --help."""
    lines = [
        (block.place, command.text) for fate in ("run", "apart", "not run") for block, command, _ in _commands(fate)
    ]
    lines += [
        (name, line) for name, text in help_texts().items() for line in re.findall("^ *(.*starling .*)", text, re.M)
    ]
    found = [(place, words) for place, line in lines for words in _starling_words(line)]
    assert len(found) > 50
    for place, words in found:
        try:
            parsed(words)
        except click.UsageError as error:
            raise AssertionError(f"{place}: starling {shlex.join(words)}: {error.format_message()}") from None


def test_the_marks_are_read(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        '<!-- an aside -->\n<!-- not run, "b": needs\na GPU -->\n<!-- run apart, "c": slow -->\n```sh\n'
        "# a comment\na 'of two\nlines' \\\n  and three\nb\nc <<X\nd\nX\npip install e\n"
        "for i in 1; do\n  f\ndone\n```\n\n"
        '<!-- run apart: takes minutes -->\n<!-- not run, "b": illustrates -->\n\n```console\n$ a\n1\n2\n$ b\n```\n'
    )
    first, second = blocks_of(page)
    texts = [command.text for command in first.commands()]
    assert texts == [
        "a 'of two\nlines' \\\n  and three",
        "b",
        "c <<X\nd\nX",
        "pip install e",
        "for i in 1; do\n  f\ndone",
    ]
    fates = [first.fate(command) for command in first.commands()]
    assert fates == [("run", ""), ("not run", "needs a GPU"), ("apart", "slow"), ("apart", "installs"), ("run", "")]
    assert [(command.text, command.output) for command in second.commands()] == [("a", "1\n2\n"), ("b", "")]
    fates = [second.fate(command) for command in second.commands()]
    assert fates == [("apart", "takes minutes"), ("not run", "illustrates")]
    assert (first.line, second.line) == (5, 23)


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ("<!-- not run -->", "a mark is not of the form"),
        ("<!-- not run: -->", "a mark is not of the form"),
        ('<!-- not run, "x": needs a GPU -->', "the mark names 'x', which no command of the block has"),
    ],
)
def test_a_mark_that_says_nothing_is_refused(tmp_path: Path, mark: str, message: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"{mark}\n```sh\na\n```\n")
    with pytest.raises(AssertionError, match=re.escape(message)):
        [block.check() for block in blocks_of(page)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```sh\ntrue\nfalse\n```\n", "page.md:1: exit code 1 of: false"),
        ("```sh\nfalse | true\n```\n", "page.md:1: exit code 1 of: false | true"),
        ("```console\n$ echo a b\na c\n```\n", "which is not a\\ c"),
        ("```console\n$ printf 'a\\nb\\n'\na\n```\n", "printed:\na\nb"),
        ("```python\nraise SystemExit(3)\n```\n", "page.md:1: exit code 3"),
        ('```json\n{"a": 1, }\n```\n', "Expecting"),
        ('<!-- form of: questions.jsonl -->\n```json\n{"id": 7}\n```\n', "questions.jsonl has"),
        ("```sh\nstarling serve nosuch\n```\n", "page.md:1: not ready: starling serve nosuch"),
    ],
)
def test_a_block_that_fails_or_says_something_untrue_is_found(tmp_path: Path, text: str, message: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with (
        reading(tmp_path / "folder", tmp_path / "notes") as reader,
        pytest.raises((AssertionError, json.JSONDecodeError), match=re.escape(message)),
    ):
        _run(page, reader, "run")


def test_a_reader_keeps_folder_and_variables_and_a_server_runs_beside_the_next_blocks(
    tmp_path: Path, tiny_bundle: Path
) -> None:
    """Under its documented port, and gone when another takes the port."""
    page = tmp_path / "page.md"
    page.write_text(
        "```sh\nmkdir inner && cd inner\nexport NAME=tiny\nstarling serve ../$NAME   # a server\n"
        "curl http://127.0.0.1:8000/v1/models | grep tiny\n```\n\n"
        "```python\nimport os, urllib.request\nassert os.getcwd().endswith('inner')\n"
        "assert urllib.request.urlopen('http://127.0.0.1:8000/health').status == 200\n```\n\n"
        "```console\n$ starling serve ../tiny --model-name other --port 8000\n… on http://127.0.0.1:8000 …\n"
        '$ curl http://localhost:8000/v1/models/other\n{"id":"other",…}\n```\n'
    )
    with reading(tmp_path / "folder", tmp_path / "notes") as reader:
        copy_bundle(tiny_bundle, reader.folder / "tiny")
        _run(page, reader, "run")


def _run(document: Path, reader: Reader, fate: Fate, *, only: str | None = None, but: str | None = None) -> None:
    """Run the document's commands of this fate, or those of them with or without this reason."""
    for block, command, reason in _commands(fate, [document]):
        if only in (None, reason) and reason != but:
            reader.run(block, command)


def _commands(fate: Fate, of: list[Path] | None = None) -> Iterator[tuple[Block, Command, str]]:
    """Every command of the documents that has this fate, with the reason."""
    for document in of or [README, *PAGES]:
        for block in blocks_of(document):
            if block.language in RUN_LANGUAGES:
                block.check()
                found = [(command, *block.fate(command)) for command in block.commands()]
                yield from ((block, command, reason) for command, its, reason in found if its == fate)


def _listing() -> Iterator[str]:
    for block, command, reason in _commands("not run"):
        first = command.text.splitlines()[0].split("  #")[0].rstrip(" \\")
        yield f"{block.document}: {first}: {reason}"


def _exports(document: Path) -> dict[tuple[str, ...], str]:
    """The folder that a document exports to, by the other arguments."""
    found = (_export(command.text) for _, command, _ in _commands("run", [document]))
    return {arguments: folder for arguments, folder in filter(None, found)}


def _export(text: str) -> tuple[tuple[str, ...], str] | None:
    words = next(iter(_starling_words(text)), []) if text.startswith("starling export ") else []
    return ((words[1], *words[3:]), words[2]) if words else None


def _maker(exported: Exported, scratch: Path) -> Callable[[str, Path], bool]:
    """What the tests have made already: bundles, and the environment of tritonserver."""

    def made(text: str, folder: Path) -> bool:
        export = _export(text)
        if export is not None and export[0] in exported:
            copy_bundle(exported[export[0]], folder / export[1])
            return True
        recipe = re.search(r"(\S+)/make_environment\.sh (\S+)", text)
        if recipe is None:
            return False
        environment = triton_server.environment(folder / recipe[1])
        triton_server.with_this_checkout(environment, folder / recipe[2])
        return True

    return made


def _place_bundles(exported: Exported, folder: Path) -> None:
    for arguments, names in NAMES.items():
        for name in names:
            copy_bundle(exported[arguments], folder / name)


def _sums(bundle: Path) -> dict[str, str]:
    files = json.loads((bundle / "bundle.json").read_text())["files"]
    return {name: record["sha256"] for name, record in files.items()}


def _starling_words(text: str) -> Iterator[list[str]]:
    """The words of each `starling COMMAND …` in a shell's line; not of those that only ask for help."""
    lexer = shlex.shlex(text.replace("\\\n", " "), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] | None = None
    for token in [*lexer, ";"]:
        if words is not None and re.fullmatch(r"[();<>|&]+", token):
            if words and words[0].isalpha() and "--help" not in words:
                yield words
            words = None
        elif words is not None:
            words.append(token)
        elif token == "starling":
            words = []


def _copy_checkout(to: Path) -> None:
    """The files that belong to the checkout, as a clone has them."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)

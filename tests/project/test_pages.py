"""What the pages name in the code is there: every file and folder, and the functions of "where is" and "how to add"."""

import re
from pathlib import Path

import pytest
from document_blocks import ROOT, documents

PAGES = [*documents(), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"]
MAP = ROOT / "docs" / "architecture.md"
#: In backticks: a path that begins with one of our top-level folders.
FOLDERS = ("cli", "deploy", "docs", "engine", "export", "profiling", "serving", "starling", "tests", ".ci")
CODE = re.compile(rf"`((?:{'|'.join(map(re.escape, FOLDERS))})/[\w./-]*)`")
#: A file's name alone.
NAME_ALONE = re.compile(r"`(\w+\.(?:py|cpp|h))`")
#: In backticks, a name that can only be one of the code: it has an underscore or capitals within, or a dot.
CODE_NAME = re.compile(r"`((?:[A-Za-z_]\w*\.)?(?=\w*(?:_|[a-z][A-Z]|[A-Z]{2}))[A-Za-z_]\w*)`")
#: In a link: a path from the page's folder, with or without a heading.
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = {path for path in CODE.findall(text) if "NAME" not in path}
    assert not {path for path in named if not (ROOT / path).exists()}
    files = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")}
    assert set(NAME_ALONE.findall(text)) <= files | {"setup.py"}
    linked = {path for path, _ in LINK.findall(text) if path}
    assert not {path for path in linked if not (page.parent / path).exists()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_headings_have_their_heading(page: Path) -> None:
    for path, heading in LINK.findall(page.read_text(encoding="utf-8")):
        target = page.parent / path if path else page
        if heading and target.suffix == ".md":
            assert heading[1:] in anchors(target), f"{page.name} links to {path}{heading}"


def how_to_add() -> list[str]:
    """The sections of the map that say what to touch."""
    return MAP.read_text(encoding="utf-8").partition("\n## How to add …\n")[2].split("\n### ")[1:]


def where_is() -> list[str]:
    """The lines of the map that say where something is."""
    section = MAP.read_text(encoding="utf-8").partition("\n## Where is …\n")[2].partition("\n## ")[0]
    return [line for line in section.splitlines() if "?" in line]


def test_the_map_says_where_things_are() -> None:
    assert where_is()


@pytest.mark.parametrize("section", how_to_add(), ids=lambda section: section.partition("\n")[0])
def test_what_to_touch_is_in_the_files_named_beside_it(section: str) -> None:
    assert len(CODE.findall(section)) > 1
    assert not missing_names(section)


@pytest.mark.parametrize("line", where_is(), ids=lambda line: line.partition("?")[0])
def test_what_is_asked_for_is_in_the_files_named_beside_it(line: str) -> None:
    assert CODE.findall(line)
    assert not missing_names(line)


def missing_names(section: str) -> set[str]:
    """Names of the code that none of the files named beside them has."""
    paths = [ROOT / path for path in CODE.findall(section) if "NAME" not in path]
    files = [file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files if file.suffix == ".py")
    known = {"GGUF_CONFIG_MAPPING", "NAME"}  # transformers', and any name
    names = {name.rpartition(".")[2].rstrip("…") for name in CODE_NAME.findall(section)} - known
    return {name for name in names if not re.search(rf"\b{name}\b", text)}


def test_a_path_that_is_gone_is_noticed() -> None:
    assert CODE.findall("`engine/nosuch.py` and `engine/` and `serving/x` and `--engine/y`") == [
        *("engine/nosuch.py", "engine/", "serving/x")
    ]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

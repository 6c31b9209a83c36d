"""Every file or folder of the project that README.md, docs/ and CONTRIBUTING.md name is there."""

import re
from pathlib import Path

import pytest
from document_blocks import ROOT, documents

PAGES = [*documents(), ROOT / "CONTRIBUTING.md"]
#: In backticks: a path that begins with one of our top-level folders.
FOLDERS = ("cli", "deploy", "docs", "engine", "export", "profiling", "serving", "starling", "tests", ".ci")
CODE = re.compile(rf"`((?:{'|'.join(map(re.escape, FOLDERS))})/[\w./-]*)`")
#: In a link: a path from the page's folder, with or without a heading.
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = {path for path in CODE.findall(text) if not re.search(r"NAME", path)}
    assert not {path for path in named if not (ROOT / path).exists()}
    linked = {path for path, _ in LINK.findall(text) if path}
    assert not {path for path in linked if not (page.parent / path).exists()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_headings_have_their_heading(page: Path) -> None:
    for path, heading in LINK.findall(page.read_text(encoding="utf-8")):
        target = page.parent / path if path else page
        if heading and target.suffix == ".md":
            assert heading[1:] in anchors(target), f"{page.name} links to {path}{heading}"


def test_a_path_that_is_gone_is_noticed() -> None:
    assert CODE.findall("`engine/nosuch.py` and `engine/` and `serving/x` and `--engine/y`") == [
        *("engine/nosuch.py", "engine/", "serving/x")
    ]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

"""What inspect, doctor and evaluate show: lines of the terminal's width, and whole ones in a pipe."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from command_line import copy_bundle, edit_manifest, on_terminal, starling, succeed

WIDTHS = (60, 80, 120)
EVALUATE = ("--max-tokens", "64", "--window", "32")


def too_long(text: str, width: int) -> list[str]:
    """Lines wider than the terminal, but for a name and one word that is too long: a path or digest to be copied."""
    return [line for line in text.splitlines() if len(line) > width and len(line.split()) > 2]


def joined(text: str) -> str:
    """The text with its lines joined as they were before the terminal's width was known."""
    return " ".join(text.split())


@pytest.mark.parametrize("width", WIDTHS)
def test_inspect_and_doctor_keep_to_the_width_and_lose_no_word(width: int, tiny_bundle: Path) -> None:
    for arguments in (("inspect", tiny_bundle), ("doctor",)):
        shown = starling(*arguments, env={"COLUMNS": str(width)})
        assert shown.returncode == 0
        assert too_long(shown.stdout, width) == []
        whole = succeed(*arguments)
        # How much memory is free changes from one to the other.
        assert re.sub(r"[\d.]+ GB free", "", joined(shown.stdout)) == re.sub(r"[\d.]+ GB free", "", joined(whole))


def test_a_long_text_goes_on_below_its_own_beginning(tiny_bundle: Path) -> None:
    lines = starling("inspect", tiny_bundle, env={"COLUMNS": "60"}).stdout.splitlines()
    [at] = [number for number, line in enumerate(lines) if line.startswith("shape ")]
    beginning = lines[at].index("2 layers")
    assert lines[at + 1].startswith(" " * beginning)
    assert lines[at + 1][beginning] != " "


def test_a_terminal_is_asked_for_its_width(tiny_bundle: Path) -> None:
    text = on_terminal(60, "inspect", tiny_bundle)
    assert too_long(text, 60) == []
    assert 50 < max(map(len, text.splitlines())) <= 60


def test_a_pipe_gets_one_line_for_each_row(tiny_bundle: Path) -> None:
    lines = succeed("inspect", tiny_bundle).splitlines()
    assert all(re.match(r"\S", line) for line in lines)
    assert max(map(len, lines)) > 100


@pytest.mark.parametrize("columns", ["", "0", "wide", "-5", "3"])
def test_a_width_that_says_nothing_breaks_nothing(columns: str, tiny_bundle: Path) -> None:
    finished = starling("inspect", tiny_bundle, env={"COLUMNS": columns})
    assert finished.returncode == 0
    assert joined(finished.stdout) == joined(succeed("inspect", tiny_bundle))


def test_notes_and_names_of_any_length_stay_whole(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = copy_bundle(tiny_bundle, tmp_path / "bundle")
    digest = "0123456789abcdef" * 6
    edit_manifest(bundle, notes=[f"{'many words ' * 20}then {digest} and an end"])
    text = starling("inspect", bundle, env={"COLUMNS": "60"}).stdout
    assert digest in text
    assert too_long(text, 60) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_evaluate_keeps_to_the_width(width: int, tiny_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    arguments: Sequence[str | Path] = ("evaluate", tiny_bundle, *EVALUATE, "--reference", tiny_bundle)
    finished = starling(*arguments, "--output", output, env={"COLUMNS": str(width)})
    assert finished.returncode == 0, finished.stderr
    assert too_long(finished.stdout, width) == []
    assert f"{json.loads(output.read_text())['perplexity']:.3f}" in finished.stdout

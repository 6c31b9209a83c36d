"""Damaged checkpoints and bundles end in a use or in a line: no crash, no hang, nothing outside their folders."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from plain_checkpoints import write_folder

from starling.export.checkpoints.model_source import open_checkpoint
from starling.export.exporter import ExportOptions, export_bundle

#: So many damaged folders, GGUF files and bundles; each takes half a second.
CHECKPOINTS, BUNDLES = 20, 50


def run(script: str, *arguments: object) -> dict[str, Any]:
    """The figures of one of the programs beside this file."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    figures: dict[str, Any] = json.loads(finished.stdout.strip().splitlines()[-1])
    print(script, figures)
    return figures


@pytest.mark.slow
def test_damaged_checkpoints(tmp_path: Path, rounds: int) -> None:
    figures = run("checkpoint_cases.py", CHECKPOINTS * rounds, 1, tmp_path)
    assert not figures["bad"]
    assert figures["counts"] == {"folder": CHECKPOINTS * rounds, "gguf": CHECKPOINTS * rounds}
    assert figures["refusals"].keys() == {"opened", "a line"}


@pytest.mark.slow
def test_damaged_bundles(tmp_path: Path, rounds: int) -> None:
    folder = write_folder(tmp_path / "checkpoint")
    export_bundle(open_checkpoint(str(folder)), tmp_path / "bundle", ExportOptions(check=False))
    (tmp_path / "work").mkdir()
    figures = run("bundle_cases.py", tmp_path / "bundle", BUNDLES * rounds, 1, tmp_path / "work")
    assert not figures["bad"]
    assert sum(figures["counts"].values()) == BUNDLES * rounds
    assert figures["refusals"].keys() == {"answered", "a line"}

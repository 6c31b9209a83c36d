"""The shell's completion: what it offers, through the script that bash reads, and that it loads nothing heavy."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import HEAVY

from starling.cli.command_group import COMMANDS
from starling.engine.names import DIALECTS, SCHEMES
from starling.export.checkpoints.random_models import RANDOM_MODELS

pytestmark = pytest.mark.slow

COMPLETE = (
    "import sys\n"
    "from starling.cli.main import main\n"
    "try:\n"
    "    main()\n"
    "finally:\n"
    f"    sys.stderr.write(', '.join(name for name in {HEAVY} if name in sys.modules))\n"
)
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not here")


def offered(*words: str, cwd: Path | None = None) -> list[tuple[str, str]]:
    """(kind, text) of what is offered for the last word of `starling WORDS…`."""
    line = " ".join(["starling", *words])
    env = {**os.environ, "_STARLING_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words))}
    done = subprocess.run(
        [sys.executable, "-c", COMPLETE], env=env, cwd=cwd, capture_output=True, text=True, check=True
    )
    assert done.stderr == "", "what was loaded, or went wrong"
    return [(kind, text) for kind, _, text in (entry.partition(",") for entry in done.stdout.splitlines())]


def plain(*words: str, cwd: Path | None = None) -> list[str]:
    return [text for kind, text in offered(*words, cwd=cwd) if kind == "plain"]


def test_commands_are_completed() -> None:
    assert plain("") == list(COMMANDS)
    assert plain("ge") == ["generate"]
    assert plain("bu") == ["build"]
    assert plain("x") == []


def test_options_are_completed_and_old_names_are_not() -> None:
    bounds = ["--max-body", "--max-connections", "--max-prompt", "--max-batch", "--max-queue", "--max-seq"]
    assert plain("serve", "b", "--max-") == bounds
    assert plain("serve", "b", "--slo") == plain("serve", "b", "--qu") == []
    assert plain("export", "demo", "out", "--no-") == ["--no-check"]


def test_the_values_of_an_option_are_completed() -> None:
    assert plain("export", "demo", "out", "--quant", "") == [*SCHEMES, "none"]
    assert plain("export", "demo", "out", "--dialect", "t") == [name for name in DIALECTS if name.startswith("t")]
    assert plain("generate", "b", "--backend", "onnxruntime-") == ["onnxruntime-cpu", "onnxruntime-cuda"]


def test_models_and_files_are_completed_for_an_export() -> None:
    assert offered("export", "") == [
        *(("plain", name) for name in ("demo", *(f"random:{name}" for name in RANDOM_MODELS))),
        ("file", ""),
    ]
    assert offered("export", "./mo") == [("file", "./mo")]


@pytest.mark.parametrize("words", [("generate",), ("profile",), ("serve",), ("evaluate", "b", "--reference")])
def test_bundles_are_folders(words: tuple[str, ...]) -> None:
    assert offered(*words, "sm") == [("dir", "sm")]


def test_other_paths_are_files() -> None:
    assert offered("generate", "b", "--prompt-file", "p") == [("file", "p")]


def test_the_engines_of_the_bundle_are_completed(tmp_path: Path) -> None:
    engines = tmp_path / "bundle" / "engines"
    engines.mkdir(parents=True)
    for name in ("fast.json", "fast.plan", "small.json", ".small.json.partial"):
        (engines / name).touch()
    assert plain("generate", "bundle", "--engine", "", cwd=tmp_path) == ["fast", "small"]
    assert plain("inspect", "bundle", "--engine", "s", cwd=tmp_path) == ["small"]
    assert plain("generate", "nowhere", "--engine", "", cwd=tmp_path) == []


@needs_bash
def test_bash_completes_by_the_documented_line(tmp_path: Path) -> None:
    command = tmp_path / "starling"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m starling "$@"\n')
    command.chmod(0o755)
    page = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text(encoding="utf-8")
    documented = next(line for line in page.splitlines() if line.startswith("| bash")).split("`")[1]
    script = f'{documented}; COMP_WORDS=(starling gen); COMP_CWORD=1; _starling_completion starling; echo "$COMPREPLY"'
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "generate\n", done.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_their_script(shell: str) -> None:
    env = {**os.environ, "_STARLING_COMPLETE": f"{shell}_source"}
    done = subprocess.run([sys.executable, "-m", "starling"], env=env, capture_output=True, text=True, check=True)
    assert f"_STARLING_COMPLETE={shell}_complete" in done.stdout

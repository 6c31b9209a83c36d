"""Commands start on systems that lack what only POSIX or only Linux has (Windows, macOS)."""

import subprocess
import sys
from pathlib import Path

import pytest

# Modules and functions that Python has on POSIX only, or on Linux only.
WITHOUT = """
import os, sys
for name in ("fcntl", "grp", "pwd", "resource", "termios", "tty"):
    sys.modules[name] = None
for name in ("geteuid", "sched_getaffinity", "sysconf"):
    delattr(os, name)
from starling.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "arguments",
    [("--help",), ("doctor",), ("build", "--help"), ("export", "--help"), ("batch", "--help"), ("serve", "--help")],
    ids=" ".join,
)
def test_a_command_starts(arguments: tuple[str, ...]) -> None:
    finished = run(*arguments)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout


def test_a_bundle_is_inspected_and_runs(tiny_bundle: Path) -> None:
    for arguments in (("inspect", tiny_bundle), ("generate", tiny_bundle, "Hello", "--max-tokens", "2")):
        finished = run(*arguments)
        assert finished.returncode == 0, finished.stderr


def test_a_build_gets_as_far_as_its_first_refusal(tiny_bundle: Path) -> None:
    finished = run("build", tiny_bundle)
    assert finished.returncode == 2
    assert finished.stderr.count("\n") == 1
    assert "dialect" in finished.stderr


def test_a_folder_is_put_in_place(tmp_path: Path) -> None:
    program = WITHOUT.partition("from starling.cli")[0] + (
        "import ctypes; del ctypes.CDLL; from pathlib import Path; from starling.engine.whole_files import new_folder\n"
        "for text in ('first', 'second'):\n"
        "    with new_folder(Path(sys.argv[1]), lambda: None) as work: (work / 'text').write_text(text)"
    )
    finished = subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], capture_output=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "text").read_text() == "second"

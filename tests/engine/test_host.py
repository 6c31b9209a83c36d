"""A folder appears whole or not at all, and what stood in its place is never lost."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from starling.engine.errors import StarlingError, UserError
from starling.engine.host import new_folder

DEAD = 2**22 + 1  # above Linux' largest process number


def absent(target: Path) -> Callable[[], None]:
    """Without --force."""

    def check() -> None:
        if target.exists():
            raise UserError(f"{target} exists")

    return check


def anything() -> None:
    """With --force."""


def write(target: Path, text: str, check: Callable[[], None]) -> None:
    with new_folder(target, check) as work:
        (work / "text").write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {path.parent.name: path.read_text() for path in sorted(folder.glob("*/text"))} | {
        path.name: "" for path in folder.glob(".*") if not (path / "text").is_file()
    }


def test_a_failing_replacement_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    write(target, "first", anything)
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(28, "No space left on device")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(StarlingError, match="the disk is full"):
        write(target, "second", anything)
    assert content(tmp_path) == {"out": "first"}


def test_an_old_folder_gets_its_name_back_where_its_replacement_was_killed(tmp_path: Path) -> None:
    target = tmp_path / "out"
    program = (
        "import os, sys; from pathlib import Path; from starling.engine.host import new_folder\n"
        "rename = Path.rename\n"
        "Path.rename = lambda self, to: os._exit(9) if '.partial-' in self.name else rename(self, to)\n"
        "with new_folder(Path(sys.argv[1]), lambda: None) as work: (work / 'text').write_text('second')"
    )
    write(target, "first", anything)
    killed = subprocess.run([sys.executable, "-c", program, str(target)], check=False)
    assert killed.returncode == 9
    assert not target.exists()
    with pytest.raises(UserError, match="exists"):
        write(target, "third", absent(target))
    assert content(tmp_path) == {"out": "first"}
    write(target, "third", anything)
    assert content(tmp_path) == {"out": "third"}


def test_leftovers_of_dead_processes_are_cleared_and_others_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"
    write(target, "first", anything)
    cleared = (f".out.old-{DEAD}", f".out.partial-{DEAD}", f".out.partial-{os.getpid()}")
    kept = (f".out.partial-{os.getppid()}", ".out.old-notes")
    for name in (*cleared, *kept):
        (tmp_path / name).mkdir()
    write(target, "second", anything)
    assert content(tmp_path) == {"out": "second"} | dict.fromkeys(kept, "")


def test_the_later_of_two_to_one_place_refuses(tmp_path: Path) -> None:
    target, other = tmp_path / "out", tmp_path / "other"
    write(other, "first", anything)

    def later() -> None:
        with new_folder(target, absent(target)) as work:
            (work / "text").write_text("later")
            other.rename(target)  # another process was quicker

    with pytest.raises(UserError, match="exists"):
        later()
    assert content(tmp_path) == {"out": "first"}

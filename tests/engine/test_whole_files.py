"""A folder appears whole or not at all, and what stood in its place is never lost."""

import ctypes
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from starling.engine.errors import StarlingError, UserError
from starling.engine.whole_files import new_folder

DEAD = 2**22 + 1  # above Linux' largest process number
RENAME = "renameat2"  # Linux' rename that makes two folders change places


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


class NoSuchRename:
    """A C library from before 2018, or another system's."""


class FailingRename:
    """A C library whose kernel refuses every rename of that kind."""

    def __init__(self, number: int) -> None:
        def renameat2(*_: object) -> int:
            ctypes.set_errno(number)
            return -1

        self.renameat2 = renameat2


@pytest.fixture(params=["in one step", "no such call", "not on this file system"])
def rename(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The ways in which a folder can take another's place."""
    libraries = {"no such call": NoSuchRename(), "not on this file system": FailingRename(errno.EINVAL)}
    if request.param in libraries:
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: libraries[request.param])
    return str(request.param)


@pytest.mark.usefixtures("rename")
def test_a_folder_is_made_and_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for text in ("first", "second", "third"):
        write(target, text, anything)
        assert content(tmp_path) == {"out": text}
    target.joinpath("text").unlink()
    target.rmdir()
    target.symlink_to(tmp_path / "nothing")
    write(target, "fourth", anything)
    assert content(tmp_path) == {"out": "fourth"}
    assert not target.is_symlink()


def test_a_failing_exchange_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    write(target, "first", anything)
    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", lambda *_, **__: FailingRename(errno.ENOSPC))
        with pytest.raises(StarlingError, match="the disk is full"):
            write(target, "second", anything)
    assert content(tmp_path) == {"out": "first"}


def test_a_failing_rename_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    write(target, "first", anything)
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(28, "No space left on device")
        return rename(self, to)

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: NoSuchRename())
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(StarlingError, match="the disk is full"):
        write(target, "second", anything)
    assert content(tmp_path) == {"out": "first"}


def test_an_old_folder_gets_its_name_back_where_its_replacement_was_killed(tmp_path: Path) -> None:
    target = tmp_path / "out"
    program = (
        "import ctypes, os, sys; from pathlib import Path; from starling.engine.whole_files import new_folder\n"
        "rename = Path.rename; ctypes.CDLL = lambda *_, **__: object()\n"
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


REPLACING = """
import itertools, sys
from pathlib import Path
from starling.engine.whole_files import new_folder
print("ready", flush=True)
for number in itertools.count():
    with new_folder(Path(sys.argv[1]), lambda: None) as work:
        for name in "abcdefgh":
            (work / name).write_text(str(number))
"""


def test_kill_9_at_any_moment_leaves_a_whole_folder(tmp_path: Path) -> None:
    target, moments = tmp_path / "out", random.Random(1)
    write(target, "first", anything)
    for _ in range(20):
        with subprocess.Popen([sys.executable, "-c", REPLACING, str(target)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(moments.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
        texts = [file.read_text() for file in target.iterdir()]
        assert texts == ["first"] or (len(texts) == 8 and len(set(texts)) == 1)
    write(target, "last", anything)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_leftovers_of_ended_runs_are_cleared_and_others_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"
    write(target, "first", anything)
    cleared = (
        f".out.old-{DEAD}",
        f".out.partial-{DEAD}",
        f".out.partial-{os.getpid()}",
        f".out.partial-{os.getppid()}",
    )
    for name in (*cleared, ".out.old-notes"):
        (tmp_path / name).mkdir()
    working = f"{REPLACING.partition('for number')[0]}\nwith new_folder(Path(sys.argv[1]), lambda: None): input()"
    command = [sys.executable, "-c", working, str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        live = tmp_path / f".out.partial-{process.pid}"
        while not live.exists() or any((tmp_path / name).exists() for name in cleared):
            time.sleep(0.01)
        write(target, "second", anything)
        assert content(tmp_path) == {"out": "second", live.name: "", ".out.old-notes": ""}
        process.kill()


def test_where_folders_cannot_be_locked_a_live_process_keeps_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def refusing(*_: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")  # NFS, for a folder

    monkeypatch.setattr(fcntl, "flock", refusing)
    cleared, kept = (f".out.partial-{DEAD}", f".out.partial-{os.getpid()}"), (f".out.partial-{os.getppid()}",)
    for name in (*cleared, *kept):
        (tmp_path / name).mkdir()
    write(tmp_path / "out", "first", anything)
    assert content(tmp_path) == {"out": "first"} | dict.fromkeys(kept, "")


@pytest.mark.usefixtures("rename")
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


@pytest.mark.usefixtures("rename")
def test_what_appears_after_the_last_look_is_not_replaced(tmp_path: Path) -> None:
    target, other = tmp_path / "out", tmp_path / "other"
    write(other, "first", anything)
    looks = []

    def check() -> None:
        absent(target)()
        looks.append(target)
        if len(looks) == 2:
            shutil.copytree(other, target)  # between the look and the rename

    with pytest.raises(UserError, match="exists"):
        write(target, "later", check)
    assert (target / "text").read_text() == "first"

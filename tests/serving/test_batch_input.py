"""`starling batch` reads pipes, FIFOs and stdin as it reads files, and says so where there is nothing to do."""

import json
import os
import re
import shlex
import signal
import subprocess
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread

import pytest
from command_line import TIMEOUT_S, refusal, starling, starling_command, succeed
from http_server import wait_until

from starling.engine.errors import StarlingError
from starling.serving.batch.input_source import open_source

pytestmark = pytest.mark.slow

FIT = ("--max-seq", "128", "--threads", "2", "--max-tokens", "2")
LINES = "".join(json.dumps({"id": f"q{i}", "prompt": f"Question {i}"}) + "\n" for i in range(3))


def ids(out: Path) -> list[str]:
    return sorted(json.loads(line)["id"] for line in out.read_text().splitlines())


def in_a_shell(command: str, *arguments: str | Path, **settings: str) -> subprocess.CompletedProcess[bytes]:
    """Run bash with `$BATCH` as `starling batch ARGUMENTS…`."""
    batch = shlex.join(starling_command("batch", *arguments))
    return subprocess.run(
        ["bash", "-c", command.replace("$BATCH", batch)],
        capture_output=True,
        timeout=TIMEOUT_S,
        env={**os.environ, **settings},
        check=False,
    )


@contextmanager
def fed(descriptor: int, content: bytes) -> Iterator[None]:
    """Writes the content to a pipe while the block runs."""

    def feed() -> None:
        with os.fdopen(descriptor, "wb") as pipe:
            pipe.write(content)

    thread = Thread(target=feed)
    thread.start()
    yield
    thread.join()


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_a_pipe_is_answered_and_goes_on_like_a_file(tiny_bundle: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out.jsonl"
    succeed("batch", tiny_bundle, name, out, *FIT, stdin=LINES)
    assert ids(out) == ["q0", "q1", "q2"]
    more = LINES + '{"id": "q3", "prompt": "Another"}\n'
    again = starling("batch", tiny_bundle, name, out, *FIT, stdin=more)
    assert (again.returncode, ids(out)) == (0, ["q0", "q1", "q2", "q3"])
    assert "3 of 4 results are there already" in again.stderr


@pytest.mark.parametrize(
    "command",
    ["$BATCH <(cat $IN) $OUT", "mkfifo f; (cat $IN > f &); $BATCH f $OUT", "$BATCH - $OUT < $IN"],
    ids=["process substitution", "FIFO", "a file at stdin"],
)
def test_other_inputs_that_can_be_read_once(tiny_bundle: Path, tmp_path: Path, command: str) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(LINES)
    words = command.replace("$OUT", f"$OUT {shlex.join(FIT)}")
    finished = in_a_shell(f"cd {tmp_path}; {words}", tiny_bundle, IN=str(source), OUT=str(out))
    assert finished.returncode == 0, finished.stderr
    assert ids(out) == ["q0", "q1", "q2"]


def test_what_another_program_has_read_of_stdin_is_not_read_again(tiny_bundle: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(LINES)
    finished = in_a_shell(f"(read -r line; $BATCH - {out} {shlex.join(FIT)}) < {source}", tiny_bundle)
    assert finished.returncode == 0, finished.stderr
    assert ids(out) == ["q1", "q2"]


def test_a_bad_line_of_a_pipe_is_named(tiny_bundle: Path, tmp_path: Path) -> None:
    line = refusal("batch", tiny_bundle, "-", tmp_path / "out.jsonl", *FIT, stdin=LINES + "{\n")
    assert line.startswith("stdin, line 4: it is not JSON")


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        ("", (), "stdin is empty: nothing was answered"),
        ("\n \n", (), "stdin is empty"),
        ("{\n", ("--skip-bad",), "no line of stdin is a request"),
    ],
    ids=["nothing", "blank lines", "bad lines"],
)
def test_an_empty_input_is_no_success(
    tiny_bundle: Path, tmp_path: Path, content: str, options: tuple[str, ...], words: str
) -> None:
    out = tmp_path / "out.jsonl"
    finished = starling("batch", tiny_bundle, "-", out, *FIT, *options, stdin=content)
    assert finished.returncode == 2
    assert words in finished.stderr.splitlines()[-1]
    assert not out.exists()


def test_an_output_that_cannot_be_read_again_is_refused_before_the_input_is_read(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    unwritten, fifo, folder = (tmp_path / name for name in ("unwritten", "fifo", "folder"))
    for pipe in (unwritten, fifo):
        os.mkfifo(pipe)
    folder.mkdir()
    for out in ("/dev/full", "/dev/stdout", "-", fifo, folder):
        # Nobody writes to the input: opening it would wait for ever.
        assert f"OUTPUT {out} is no regular file" in refusal("batch", tiny_bundle, unwritten, out, *FIT)


def test_inputs_that_cannot_be_read_are_one_line(tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert "Is a directory" in refusal("batch", tiny_bundle, tmp_path, out, *FIT)
    assert "./- cannot be read: No such file" in refusal("batch", tiny_bundle, "./-", out, *FIT)
    closed = in_a_shell(f"$BATCH - {out} <&-", tiny_bundle)
    assert (closed.returncode, closed.stderr) == (
        2,
        b"error: stdin is closed: give a file, or pipe the lines in\n",
    )


def open_files(pid: int) -> list[str]:
    """The names of a process's open files; one that is closed meanwhile is left out."""
    names = []
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            names.append(os.readlink(file))
    return names


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_end_while_a_pipe_is_read_leaves_nothing_behind(
    tiny_bundle: Path, tmp_path: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    process = subprocess.Popen(
        starling_command("batch", tiny_bundle, "-", tmp_path / "out.jsonl", *FIT),
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(folder)},
    )
    try:
        assert process.stdin is not None
        process.stdin.write(LINES.encode())
        process.stdin.flush()
        # A file without a name. (The module tempfile first tries the folder with one that has a name.)
        nameless = re.compile(rf"{re.escape(str(folder))}/.* \(deleted\)")
        assert wait_until(lambda: any(nameless.fullmatch(name) for name in open_files(process.pid)), 60)
        process.send_signal(number)
        code = process.wait(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert code == {signal.SIGTERM: 143, signal.SIGINT: 130}.get(number, -number)
    assert list(tmp_path.iterdir()) == [folder]
    assert list(folder.iterdir()) == []


def test_a_pipe_is_copied_in_little_memory() -> None:
    reading, writing = os.pipe()
    content = b'{"prompt": "x"}\n' * 2**21
    tracemalloc.start()
    try:
        with fed(writing, content), open_source(f"/dev/fd/{reading}") as source:
            assert sum(map(len, source.lines())) == sum(map(len, source.lines())) == len(content)
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()
        os.close(reading)


def test_a_pipe_that_is_empty_for_a_moment_has_not_ended(tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    process = subprocess.Popen(starling_command("batch", tiny_bundle, "-", out, *FIT), stdin=reading)
    try:
        assert wait_until(lambda: os.get_blocking(reading), 60)
        with fed(writing, LINES.encode()):
            pass
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(reading)
    assert ids(out) == ["q0", "q1", "q2"]


def test_a_full_disk_is_said(small_disk: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small_disk("size=64k")  # type: ignore[operator]
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    reading, writing = os.pipe()
    try:
        with (
            fed(writing, b"x" * 30_000 + b"\n" * 60_000),
            pytest.raises(StarlingError, match="No space left on device; set TMPDIR"),
            open_source(f"/dev/fd/{reading}"),
        ):
            pass
    finally:
        os.close(reading)

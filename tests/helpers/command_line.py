"""Run the real `starling` command in processes of its own, and damage copies of bundles for it."""

import fcntl
import hashlib
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import sysconfig
import termios
import venv
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

MODULE = ("-m", "starling.cli.main")
TIMEOUT_S = 300
CHECKOUT = Path(__file__).parents[2]


def install_hint(extra: str) -> str:
    """The command that adds an extra to the installation that the tests use, which is the checkout's own."""
    return f"pip install --editable '{CHECKOUT}[{extra}]'"


def starling(
    *arguments: str | Path, stdin: str | bytes = "", env: Mapping[str, str] | None = None, python: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `starling ARGUMENTS…` to its end."""
    finished = subprocess.run(
        _command(arguments, python),
        input=stdin.encode() if isinstance(stdin, str) else stdin,
        capture_output=True,
        timeout=TIMEOUT_S,
        env={**_unsized(), **(env or {})},
        check=False,
    )
    return subprocess.CompletedProcess(
        finished.args, finished.returncode, finished.stdout.decode(), finished.stderr.decode()
    )


def _unsized() -> dict[str, str]:
    """The environment without a terminal's size, which pytest-xdist sets."""
    return {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}


def succeed(*arguments: str | Path, stdin: str = "") -> str:
    """Run `starling ARGUMENTS…`, which must succeed; its stdout."""
    finished = starling(*arguments, stdin=stdin)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def on_terminal(width: int, *arguments: str | Path) -> str:
    """What `starling ARGUMENTS…`, which must succeed, shows on a terminal of that width; without its colours."""
    terminal, end_of_process = pty.openpty()
    fcntl.ioctl(end_of_process, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    environment = {**_unsized(), "TERM": "xterm-256color"}
    with subprocess.Popen(_command(arguments, None), stdout=end_of_process, env=environment) as process:
        os.close(end_of_process)
        shown = b"".join(iter(lambda: _read_terminal(terminal), b""))
    os.close(terminal)
    assert process.returncode == 0, shown
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode()).replace("\r\n", "\n")


def _read_terminal(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux says so where the process has closed its end
        return b""


def document(*arguments: str | Path, stdin: str = "") -> Any:
    """The JSON document that `starling ARGUMENTS… --json` prints, and nothing else, on stdout."""
    return json.loads(succeed(*arguments, "--json", stdin=stdin))


def refusal(
    *arguments: str | Path,
    code: int = 2,
    stdin: str | bytes = "",
    env: Mapping[str, str] | None = None,
    python: Path | None = None,
) -> str:
    """The line with which `starling ARGUMENTS…` refuses: its only line on stderr, with the exit code `code`."""
    finished = starling(*arguments, stdin=stdin, env=env, python=python)
    errors = [line for line in finished.stderr.splitlines() if line not in PHASES and not _is_phase(line)]
    assert finished.returncode == code, finished.stderr
    assert finished.stdout == ""
    assert len(errors) == 1, finished.stderr
    assert errors[0].startswith("error: ")
    return errors[0].removeprefix("error: ")


# What `starling export` and `starling build` say of their progress before they fail.
PHASES = ("loading PyTorch", "writing weights", "comparing with PyTorch")


def _is_phase(line: str) -> bool:
    return line.startswith(("fetching ", "opening ", "tracing ", "parsing "))


@contextmanager
def running(*arguments: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """`starling ARGUMENTS…` while it runs, with pipes for stdout and stderr; killed at the end of the block."""
    process = subprocess.Popen(_command(arguments, None), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read_until(stream: IO[bytes] | None, text: bytes) -> bytes:
    """What the stream gives up to and with `text`, or to its end."""
    assert stream is not None
    seen = b""
    while text not in seen and (byte := stream.read(1)):
        seen += byte
    return seen


def end(process: subprocess.Popen[bytes], number: signal.Signals) -> tuple[int, str, str]:
    """Send a signal; exit code, and the rest of stdout and stderr."""
    process.send_signal(number)
    out, errors = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, out.decode(), errors.decode()


def copy_bundle(bundle: Path, to: Path) -> Path:
    """A copy whose files can be replaced (not written in place: they are links)."""
    for file in (path for path in bundle.rglob("*") if path.is_file()):
        copied = to / file.relative_to(bundle)
        copied.parent.mkdir(parents=True, exist_ok=True)
        os.link(file, copied)
    return to


def replace_file(file: Path, content: bytes) -> None:
    """Replace one file of a copied bundle; bundle.json does not hear of it."""
    file.unlink()
    file.write_bytes(content)


def edit_manifest(bundle: Path, **changes: Any) -> None:
    """Change fields of a copied bundle's bundle.json."""
    file = bundle / "bundle.json"
    replace_file(file, json.dumps(json.loads(file.read_text()) | changes).encode())


def replace_recorded(bundle: Path, name: str, content: bytes) -> None:
    """Replace a file of a copied bundle so that bundle.json agrees, as an export of a bad checkpoint would."""
    replace_file(bundle / name, content)
    files = json.loads((bundle / "bundle.json").read_text())["files"]
    files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_manifest(bundle, files=files)


def python_without(folder: Path, *modules: str) -> Path:
    """The Python of a new environment that has every package of this one but those that begin with `modules`."""
    venv.create(folder, symlinks=True)
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    target = Path(paths["purelib"])
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.startswith(modules) and not (target / entry.name).exists():
            (target / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


def starling_command(*arguments: str | Path, python: Path | None = None) -> list[str]:
    """The words with which a process runs `starling ARGUMENTS…`."""
    return _command(arguments, python)


def _command(arguments: tuple[str | Path, ...], python: Path | None) -> list[str]:
    return [str(python or sys.executable), *MODULE, *map(str, arguments)]

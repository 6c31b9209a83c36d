"""A peer's own environment, with the versions that the catalogue pins."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from starling.engine.errors import StarlingError
from starling.profiling.peers.catalogue import Peer

#: Written last: what an environment holds, so that a changed or half made one is installed again.
STAMP = "installed.txt"


def prepare_environment(peer: Peer, folder: Path, log: Path) -> bool:
    """Make the environment `folder` unless it is whole; whether there was something to do. Its Python: `python_of`.

    Raises StarlingError, with the last line of pip's output, where the installation fails.
    """
    wanted = "\n".join([*peer.requirements, *(f"{name}={value}" for name, value in peer.build.items())]) + "\n"
    stamp = folder / STAMP
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return False
    if not python_of(folder).exists():
        run_logged([sys.executable, "-m", "venv", str(folder)], log)
    pip = [str(python_of(folder)), "-m", "pip", "install", "--disable-pip-version-check"]
    # pip's cache knows a wheel that it built by its version, not by how it was built; nor would it build a second time.
    fresh = ["--no-cache-dir", "--force-reinstall"] if peer.build else []
    run_logged([*pip, *fresh, *peer.requirements], log, peer.build)
    stamp.write_text(wanted, encoding="utf-8")
    return True


def python_of(folder: Path) -> Path:
    """The Python of the environment in `folder`."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def run_logged(command: Sequence[str], log: Path, variables: Mapping[str, str] | None = None) -> None:
    """Run a program of a peer's environment, all that it prints added to `log`.

    Neither our package nor the network enters: PYTHONPATH is taken away. Raises StarlingError, with the last
    line that it printed, where it fails.
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | dict(variables or {})
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        start = out.tell()
        code = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment, check=False
        ).returncode
    if code != 0:
        with log.open("rb") as printed:
            printed.seek(start)
            lines = printed.read().decode("utf-8", "replace").strip().splitlines()
        last = lines[-1].strip() if lines else "it printed nothing"
        raise StarlingError(f"{Path(command[0]).name} gave exit code {code}: {last} (all of it: {log})")

"""A real tritonserver, from the nvidia-pytriton wheel, in an environment of its own that is made once and kept."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
#: Pythons that both the server's Python backend and Starling know.
PYTHONS = ("3.12", "3.11")
#: What pip says where a wheel cannot be had; any other failure is one of the recipe.
NOT_TO_BE_HAD = re.compile(r"No matching distribution|Could not find a version|NewConnectionError|name resolution")
READY_S, END_S = 90, 60


def environment(repository: Path) -> Path:
    """The environment that the repository's own recipe makes, kept in the user's cache; skips where it cannot be."""
    python = next((found for name in PYTHONS if (found := _python(name))), None)
    if sys.platform != "linux" or python is None:
        pytest.skip("the tritonserver of nvidia-pytriton takes Linux and Python 3.11 or 3.12")
    script = repository / "make_environment.sh"
    recipe = script.read_text() + (ROOT / "constraints.txt").read_text()
    version = subprocess.check_output([python, "-c", "import sys; print(sys.version)"], text=True)
    key = hashlib.sha256((recipe + version).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "starling"
    cache.mkdir(parents=True, exist_ok=True)
    made = cache / f"triton-{key}"
    with (cache / f"triton-{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (made / "complete").exists():
            _make(script, made, python)
            (made / "complete").touch()
    return made


def with_this_checkout(made: Path, folder: Path) -> Path:
    """An environment with the packages of `made` and the code of this checkout."""
    version = next((made / "lib").iterdir()).name
    subprocess.run([made / "bin" / "python", "-m", "venv", "--without-pip", folder], check=True)
    packages = folder / "lib" / version / "site-packages"
    for entry in (made / "lib" / version / "site-packages").iterdir():
        if not entry.name.lower().startswith(("starling", "__editable__")):
            (packages / entry.name).symlink_to(entry)
    (packages / "starling").symlink_to(ROOT / "starling")
    return folder


class TritonServer:
    """A running tritonserver on a repository, on loopback ports of its own."""

    def __init__(self, repository: Path, environment: Path, log: Path) -> None:
        """Start it with the repository's own start.sh; `wait_ready` is the caller's."""
        self.http, self.grpc, self.metrics_port = (f"127.0.0.1:{port}" for port in free_ports(3))
        self.log, self.environment = log, environment
        ports = {"HTTP": self.http, "GRPC": self.grpc, "METRICS": self.metrics_port}
        variables = {name: address.rpartition(":")[2] for name, address in ports.items()}
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [repository / "start.sh"],
                env={**os.environ, "ENVIRONMENT": str(environment), **variables},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        """Until the server and its models are ready; fails with the log's end where it ends before."""
        end = time.monotonic() + READY_S
        while time.monotonic() < end and self.process.poll() is None:
            if answers(f"http://{self.http}/v2/health/ready"):
                return
            time.sleep(0.1)
        pytest.fail(f"tritonserver is not ready:\n{self.log.read_text(errors='replace')[-4000:]}")

    def post(self, path: str, document: dict[str, Any]) -> tuple[int, str]:
        """Status and body of a POST."""
        request = urllib.request.Request(f"http://{self.http}/v2/{path}", json.dumps(document).encode())
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def generate(self, model: str, **fields: Any) -> dict[str, Any]:
        """The answer of the generate endpoint."""
        status, body = self.post(f"models/{model}/generate", fields)
        assert status == 200, body
        answer: dict[str, Any] = json.loads(body)
        return answer

    def refusal(self, model: str, **fields: Any) -> str:
        """The error of the generate endpoint, which must be the client's mistake."""
        status, body = self.post(f"models/{model}/generate", fields)
        assert status == 400, body
        error: str = json.loads(body)["error"]
        return error

    def events(self, model: str, **fields: Any) -> list[dict[str, Any]]:
        """The server-sent events of generate_stream."""
        status, body = self.post(f"models/{model}/generate_stream", fields)
        assert status == 200, body
        return [json.loads(line.removeprefix("data: ")) for line in body.splitlines() if line.startswith("data: ")]

    def stats(self) -> dict[str, Any]:
        """The scheduler's figures."""
        figures: dict[str, Any] = json.loads(self.generate("starling", command="stats")["answer"])
        return figures

    def idle_stats(self, timeout_s: float = 20) -> dict[str, Any]:
        """The figures as soon as nothing runs or waits; fails where that takes longer."""
        end = time.monotonic() + timeout_s
        while (stats := self.stats())["running"] or stats["waiting"]:
            assert time.monotonic() < end, stats
            time.sleep(0.05)
        return stats

    def metrics(self) -> dict[str, float]:
        """Every sample of the metrics page, by its name with labels."""
        with urllib.request.urlopen(f"http://{self.metrics_port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}

    def stub_pid(self, model: str) -> int:
        """The process of a model, a child of the server."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and _is_stub(entry, model, self.process.pid):
                return int(entry.name)
        raise AssertionError(f"no stub of {model}")

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End the server and its own process group, and wait."""
        self.process.send_signal(number)
        try:
            self.process.wait(END_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            # What a killed server leaves: start.sh's prefix with its process id, then a UUID.
            for left in Path("/dev/shm").glob(f"starling{self.process.pid}????????-????-*"):
                left.unlink(missing_ok=True)


@contextmanager
def running(repository: Path, environment: Path, log: Path) -> Iterator[TritonServer]:
    """A ready server for the length of the block."""
    server = TritonServer(repository, environment, log)
    try:
        server.wait_ready()
        yield server
    finally:
        if server.process.poll() is None:
            server.end()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _make(script: Path, folder: Path, python: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    # Pinned as in the other environment, but for what the server's packages want older: numpy 1 and protobuf 6.
    pinned = folder.with_suffix(".constraints")
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned.write_text(
        "\n".join(line for line in lines if not line.startswith(("numpy==", "ml_dtypes==", "protobuf=="))) + "\n"
    )
    source = folder.with_suffix(".source")
    shutil.rmtree(source, ignore_errors=True)
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "results")
    shutil.copytree(ROOT, source, ignore=ignored)
    finished = subprocess.run(
        [script, folder],
        env={**os.environ, "PYTHON": python, "SERVER": "1", "SOURCE": str(source), "PIP_CONSTRAINT": str(pinned)},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    shutil.rmtree(source, ignore_errors=True)
    if finished.returncode != 0 and NOT_TO_BE_HAD.search(finished.stderr):
        pytest.skip(f"the nvidia-pytriton wheel cannot be had: {finished.stderr.strip().splitlines()[-1]}")
    assert finished.returncode == 0, finished.stderr


def _python(version: str) -> str | None:
    if sysconfig.get_python_version() == version:
        return sys.executable
    found = shutil.which(f"python{version}")
    works = found and subprocess.run([found, "-c", "import venv"], capture_output=True, check=False).returncode == 0
    return found if works else None


def answers(url: str) -> bool:
    """Whether a GET of this address is answered with 200."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _is_stub(entry: Path, model: str, parent: int) -> bool:
    try:
        words = (entry / "cmdline").read_bytes().split(b"\0")
        its_parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return False
    path = f"/{model}/1/model.py".encode()
    return words[0].endswith(b"triton_python_backend_stub") and words[1].endswith(path) and its_parent == parent

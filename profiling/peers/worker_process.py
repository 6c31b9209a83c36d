"""A worker's subprocess, seen from the comparison: one request out, one reply back."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, Self

from starling.engine.errors import BackendError

#: A request that takes longer has hung: the slowest, loading or prefilling a 7B model on a CPU, takes tens of seconds.
REQUEST_TIMEOUT_S = 900.0


class WorkerProcess:
    """`worker.py` with one runtime's module, under the Python `python`. A context manager that ends the process.

    Raises BackendError, naming the worker, when the Python cannot be started, the worker dies, a request fails or
    takes longer than REQUEST_TIMEOUT_S.
    """

    def __init__(self, name: str, python: str, module: str) -> None:
        self.name = name
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        # A peer's environment is its own: our package may not enter it, nor its Python's bytecode our folder.
        environment = {
            key: value for key, value in os.environ.items() if key != "PYTHONPATH" or python == sys.executable
        }
        environment |= {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        try:
            self._process = subprocess.Popen(
                [python, str(Path(__file__).parent / "workers" / "worker.py"), module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=environment,
                text=True,
                encoding="utf-8",
            )
        except OSError as error:
            self._stderr.close()
            raise BackendError(
                f"{name}: cannot start {python!r} ({error.strerror}); give the Python of its environment"
            ) from error

    def request(self, **request: Any) -> dict[str, Any]:
        """Send one request of the protocol and wait for its reply."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = threading.Timer(REQUEST_TIMEOUT_S, self._process.kill)
        timer.start()
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            raise BackendError(f"{self.name}: the worker ended ({self._last_words()}); try its Python by hand")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise BackendError(f"{self.name}: {request['op']} failed with {reply['error']}")
        return reply

    def _last_words(self) -> str:
        """The exit code and the last line that the ended worker wrote on stderr."""
        code = self._process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode("utf-8", "replace").strip().splitlines()
        return f"exit code {code}, {lines[-1].strip()}" if lines else f"exit code {code}"

    def close(self) -> None:
        """End the worker. Its stdin closes; if that does not end it within 10 s, it is killed."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stderr.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

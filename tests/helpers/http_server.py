"""Starts the real `starling serve` on a free loopback port, for clients that we did not write."""

import http.client
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import openai
from command_line import starling_command

READY = re.compile(r"http://127\.0\.0\.1:(\d+)")
START_S = 60
MODEL = "m"


class Server:
    """One running server; only what it started itself is ever ended."""

    def __init__(
        self, bundle: Path, *options: str | Path, env: Mapping[str, str] | None = None, python: Path | None = None
    ) -> None:
        arguments = ("serve", bundle, "--model-name", MODEL, "--threads", "2", *options)
        if "--port" not in options:
            arguments += ("--port", "0")
        self.process = subprocess.Popen(
            starling_command(*arguments, python=python),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **(env or {})},
        )
        self.log: list[str] = []
        self._reader = Thread(target=self._read_log, daemon=True)
        self._reader.start()
        wait_until(lambda: self._port_line() or self.process.poll() is not None, START_S)
        line = self._port_line()
        assert line is not None, "\n".join(self.log)
        self.port = int(line[1])

    def client(self, key: str = "none") -> openai.OpenAI:
        """The real client, without retries."""
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=60)

    def request(
        self, method: str, path: str, body: bytes | Mapping[str, Any] | None = None, headers: Mapping[str, str] = {}
    ) -> tuple[int, Mapping[str, str], bytes]:
        """A plain HTTP request; status, headers in lower case, body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        try:
            connection.request(method, path, content, {"Content-Type": "application/json", **headers})
            response = connection.getresponse()
            return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
        finally:
            connection.close()

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        total = 0.0
        for line in self.request("GET", "/metrics")[2].decode().splitlines():
            sample, _, value = line.rpartition(" ")
            if sample.partition("{")[0] == name and all(
                f'{key}="{value_}"' in sample for key, value_ in labels.items()
            ):
                total += float(value)
        return total

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout=60)

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line.decode().rstrip())

    def _port_line(self) -> re.Match[str] | None:
        return next((found for line in list(self.log) if (found := READY.search(line))), None)


@contextmanager
def serving(
    bundle: Path, *options: str | Path, env: Mapping[str, str] | None = None, python: Path | None = None
) -> Iterator[Server]:
    """A running server, killed at the end of the block if it has not ended by then."""
    server = Server(bundle, *options, env=env, python=python)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.communicate()


def wait_until(condition: Callable[[], Any], seconds: float) -> bool:
    """Whether the condition came true within the time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return bool(condition())

"""A server as a process of its own: started, asked for several answers at once, ended."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from http.client import HTTPConnection, HTTPException
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, Self

from starling.engine.errors import BackendError, UserError
from starling.profiling.load.servers.event_streams import Event, read_at_once
from starling.profiling.peers.contenders import OURS, Contender, opened

#: Loading a model of a few GB takes less.
READY_S = 300.0
END_S = 20.0


@dataclass(frozen=True, slots=True)
class Stream:
    """One answer: when its pieces came, in ms after it was asked for, its tokens, and its text or their ids."""

    arrivals_ms: list[float]
    count: int
    text: str | None = None
    ids: list[int] | None = None


class Server(Protocol):
    """A running server. `about` says what is kept of it with the results."""

    name: str
    about: Mapping[str, Any]

    def answer(self, prompts: Sequence[list[int]], new_tokens: int) -> list[Stream]:
        """Greedy answers of that many tokens to all prompts at once. Raises BackendError where the server fails."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


@dataclass(frozen=True, slots=True)
class Room:
    """What a server must have room for, with so many threads."""

    streams: int
    tokens: int
    threads: int


def server_of(contender: Contender, room: Room) -> Server:
    """The server of a contender, not yet started. Raises UserError where its program is not installed."""
    if contender.peer == OURS:
        return HttpServer(contender, room, STARLING)
    if contender.peer == LLAMA_CPP:
        return HttpServer(contender, room, LLAMA_SERVER)
    return BatchingWorker(contender, room)


@dataclass(frozen=True, slots=True)
class Api:
    """How a program that serves HTTP is started and asked; `command` is without the port, which comes last."""

    command: Callable[[Contender, Room], list[str]]
    ready: str
    path: str
    body: Callable[[list[int], int], dict[str, Any]]
    #: The text of an event and the tokens of the whole answer, where it says them.
    read: Callable[[dict[str, Any]], tuple[str, int | None]]
    versions: Callable[[Contender], dict[str, str]]


def _starling_command(contender: Contender, room: Room) -> list[str]:
    return [
        *(str(contender.python), "-m", "starling", "serve", str(contender.model), "--backend", "onnxruntime-cpu"),
        *("--max-batch", str(room.streams), "--max-queue", str(room.streams), "--max-seq", str(room.tokens)),
        *("--threads", str(room.threads), "--log-level", "warning", "--model-name", "model", "--port"),
    ]


def _starling_versions(contender: Contender) -> dict[str, str]:
    return {name: version(name) for name in ("starling-llm", "onnxruntime", "uvicorn")}


def _starling_body(prompt: list[int], new_tokens: int) -> dict[str, Any]:
    asked = {"model": "model", "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
    return {**asked, "stream": True, "stream_options": {"include_usage": True}}


def _starling_event(data: dict[str, Any]) -> tuple[str, int | None]:
    usage = data.get("usage")
    return "".join(choice["text"] for choice in data["choices"]), usage["completion_tokens"] if usage else None


def _llama_command(contender: Contender, room: Room) -> list[str]:
    stored = contender.settings.get("use_extra_bufts") is False
    return [
        *(str(llama_server(contender)), "--model", str(next(contender.model.glob("*.gguf")))),
        *("--parallel", str(room.streams), "--ctx-size", str(room.streams * room.tokens)),
        *("--threads", str(room.threads), "--threads-batch", str(room.threads), "--log-verbosity", "1"),
        *(["--no-repack"] if stored else []),
        "--port",
    ]


def llama_server(contender: Contender) -> Path:
    """The llama-server of a contender's environment. Raises UserError where it has none."""
    environment = contender.python.parent.parent
    found = next(environment.glob("lib/python3*/site-packages/bin/llama-server"), None)
    if found is None:
        raise UserError(
            f"{contender.name}: {environment} has no llama-server; run starling.profiling.peers.install again, which "
            "builds it with llama.cpp"
        )
    return found


def _llama_versions(contender: Contender) -> dict[str, str]:
    """The package whose source it was built from."""
    found = next(llama_server(contender).parent.parent.glob("llama_cpp_python-*.dist-info"), None)
    return {} if found is None else {"llama-cpp-python": found.stem.partition("-")[2]}


def _llama_body(prompt: list[int], new_tokens: int) -> dict[str, Any]:
    asked = {"prompt": prompt, "n_predict": new_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    return {**asked, "samplers": ["top_k"], "top_k": 1}  # the cheapest chain that is greedy


def _llama_event(data: dict[str, Any]) -> tuple[str, int | None]:
    return data["content"], data["tokens_predicted"] if data["stop"] else None


LLAMA_CPP = "llama.cpp"
STARLING = Api(_starling_command, "/ready", "/v1/completions", _starling_body, _starling_event, _starling_versions)
LLAMA_SERVER = Api(_llama_command, "/health", "/completion", _llama_body, _llama_event, _llama_versions)


class HttpServer:
    """`starling serve`, or llama-server, on a free port of this machine."""

    def __init__(self, contender: Contender, room: Room, api: Api) -> None:
        """Raises UserError where the program is not installed."""
        self.name, self._api, self._port = contender.name, api, _free_port()
        command = api.command(contender, room)
        # Names alone: where a folder lies on this machine is nobody's business.
        shown = [Path(part).name if os.sep in part else part for part in command]
        self.about: Mapping[str, Any] = {"command": shown, "versions": api.versions(contender)}
        self._command = [*command, str(self._port)]
        self._own = str(contender.python) == sys.executable
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by __exit__)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        # A peer's environment is its own: our package may not enter it.
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH" or self._own}
        begin = time.perf_counter()
        self._process = subprocess.Popen(self._command, stdout=self._log, stderr=self._log, env=environment)
        try:
            self._wait_until_ready(begin + READY_S)
        except BaseException:
            self.__exit__()
            raise
        self.about = {**self.about, "load_ms": (time.perf_counter() - begin) * 1e3}
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()

    def answer(self, prompts: Sequence[list[int]], new_tokens: int) -> list[Stream]:
        """Raises BackendError where the server ends, refuses, or gives another number of tokens."""
        bodies = [self._api.body(prompt, new_tokens) for prompt in prompts]
        try:
            answers = read_at_once(self._port, self._api.path, bodies)
        except BackendError as error:
            raise BackendError(f"{self.name}: {error} ({self._state()})") from error
        return [self._stream(events) for events in answers]

    def _stream(self, events: Sequence[Event]) -> Stream:
        arrivals, texts, count = list[float](), list[str](), 0
        for event in events:
            if "error" in event.data:
                raise BackendError(f"{self.name}: {json.dumps(event.data['error'])}")
            text, total = self._api.read(event.data)
            count = total or count
            if text:
                arrivals.append(event.ms)
                texts.append(text)
        return Stream(arrivals, count, text="".join(texts))

    def _wait_until_ready(self, until: float) -> None:
        assert self._process is not None
        while time.perf_counter() < until:
            if self._process.poll() is not None:
                raise BackendError(f"{self.name}: the server ended before it was ready ({self._state()})")
            connection = HTTPConnection("127.0.0.1", self._port, timeout=5)
            try:
                connection.request("GET", self._api.ready)
                if connection.getresponse().status == 200:
                    return
            except (OSError, HTTPException):
                pass
            finally:
                connection.close()
            time.sleep(0.05)
        raise BackendError(f"{self.name}: the server was not ready after {READY_S:.0f} s")

    def _state(self) -> str:
        """Whether it runs, and the last line that it wrote."""
        assert self._process is not None
        code = self._process.poll()
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        state = "it runs" if code is None else f"exit code {code}"
        return f"{state}, {lines[-1].strip()}" if lines else state


class BatchingWorker:
    """OpenVINO GenAI's continuous batching, driven in its own process, without HTTP: its package has no server."""

    def __init__(self, contender: Contender, room: Room) -> None:
        batching = replace(contender, worker="openvino_batching_worker")
        self.name = contender.name
        self.about: Mapping[str, Any] = {}
        self._opened = opened(batching, room.threads, room.streams * room.tokens)

    def __enter__(self) -> Self:
        self._process, about = self._opened.__enter__()
        self.about = {key: about[key] for key in ("load_ms", "versions", "settings")}
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.__exit__(None, None, None)

    def answer(self, prompts: Sequence[list[int]], new_tokens: int) -> list[Stream]:
        """Raises BackendError where the worker fails."""
        reply = self._process.request(op="streams", prompts=list(prompts), new_tokens=new_tokens)
        return [Stream(one["arrivals_ms"], len(one["tokens"]), ids=one["tokens"]) for one in reply["streams"]]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port

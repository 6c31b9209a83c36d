"""Which of our files a token, a streamed chat request and an export pass: counted, bounded, and as the map says.

`pytest -s tests/project/test_traced_flows.py` prints the files of each with their functions and threads.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from document_blocks import ROOT

from starling.engine import Engine
from starling.engine.serving_loop import ServingLoop
from starling.export.checkpoints.model_source import open_checkpoint
from starling.export.exporter import ExportOptions, export_bundle
from starling.export.quantization.blocks import BlockQuantization
from starling.serving.http.app import make_app
from starling.serving.http.request_bodies import API_DEFAULTS, Limits
from starling.serving.http.served import Served
from starling.serving.http.service import Service

MAP = ROOT / "docs" / "architecture.md"
#: Folders with our files; environments lie in the checkout too.
ROOMS = ("cli", "engine", "export", "profiling", "serving")
#: The most files that each may pass: what was reached. The aims of the layout were 5, 15 and 25.
TOKEN_FILES, CHAT_FILES, EXPORT_FILES = 6, 41, 57
#: An export without its comparison with PyTorch, which opens an engine on the new bundle.
EXPORT_ALONE_FILES = 28
#: A row of a flow's table: thread, function and file.
STEP = re.compile(r"^\| (?P<thread>[^|]+) \| `(?P<function>[\w.]+)` \| `(?P<file>[\w/.]+)` \|", re.MULTILINE)
CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Hello"}],
    "max_tokens": 4,
    "temperature": 0,
    "stream": True,
}

Functions = dict[tuple[str, str], set[str]]


class Recorder:
    """Notes each of our functions that is called, on any thread, while it is on: its file and name, by its threads."""

    def __init__(self) -> None:
        self._codes: dict[tuple[str, str], set[str]] = {}
        self._is_on = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Watch this thread and those that it starts; nothing is noted yet."""
        threading.setprofile(self._notice)
        sys.setprofile(self._notice)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]

    @contextmanager
    def on(self) -> Iterator[None]:
        """Note what is called."""
        self._is_on = True
        try:
            yield
        finally:
            self._is_on = False

    def functions(self) -> Functions:
        """Threads by (file, function), in the order of the first calls; a nested function is named OUTER.INNER."""
        found: Functions = {}
        for (file, name), threads in self._codes.items():
            path = Path(file).resolve()
            if path.is_file() and any(path.is_relative_to(ROOT / room) for room in ROOMS):
                found[path.relative_to(ROOT).as_posix(), name.replace(".<locals>", "")] = threads
        return found

    def _notice(self, frame: FrameType, event: str, argument: object) -> None:
        # The bodies of modules and classes, which an import runs, are not functions.
        if self._is_on and event == "call" and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
            key = (frame.f_code.co_filename, frame.f_code.co_qualname)
            self._codes.setdefault(key, set()).add(threading.current_thread().name)


def token_functions(bundle: Path) -> Functions:
    """What the third token of a stream passes: nothing that happens once is among it."""
    recorder = Recorder()
    with Engine(bundle, max_seq=256, threads=1) as engine, recorder.installed():
        stream = engine.stream("Once upon a time", max_tokens=8, ignore_eos=True)
        next(stream)
        next(stream)
        with recorder.on():
            next(stream)
    return recorder.functions()


def chat_functions(bundle: Path) -> Functions:
    """What a streamed chat request passes, from the ASGI application to the last event; the second of two."""
    recorder = Recorder()
    with (
        recorder.installed(),
        Engine(bundle, max_seq=256, max_batch=2, threads=1) as engine,
        ServingLoop(engine) as loop,
    ):
        limits = Limits(models=("tiny",), max_seq=256, max_prompt=256, defaults=API_DEFAULTS)
        app = make_app(Served(Service(engine, loop, limits), None), max_body=2**20)

        async def ask_twice() -> bytes:
            await _post(app, "/v1/chat/completions", CHAT)
            with recorder.on():
                return await _post(app, "/v1/chat/completions", CHAT)

        answer = asyncio.run(ask_twice())
    assert answer.endswith(b"data: [DONE]\n\n")
    return recorder.functions()


def export_functions(out: Path) -> Functions:
    """What an export of random weights passes: opened, traced, quantized to int8, and compared with PyTorch."""
    recorder = Recorder()
    with recorder.installed(), recorder.on():
        checkpoint = open_checkpoint("random:starling-tiny")
        export_bundle(checkpoint, out, ExportOptions(quantization=BlockQuantization("int8"), check=True))
    return recorder.functions()


async def _post(app: Callable[..., Any], path: str, document: dict[str, Any]) -> bytes:
    """The body of the answer to one request, by ASGI."""
    messages = [{"type": "http.request", "body": json.dumps(document).encode(), "more_body": False}]
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        if not messages:
            await asyncio.Event().wait()  # the client stays
        return messages.pop()

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    scope = {
        **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "method": "POST"},
        **{"path": path, "raw_path": path.encode(), "root_path": "", "query_string": b""},
        **{"headers": [(b"content-type", b"application/json")], "client": ("a", 1), "server": ("b", 80)},
    }
    await app(scope, receive, send)
    return b"".join(message.get("body", b"") for message in sent)


def files_of(title: str, found: Functions) -> list[str]:
    """The files, printed with their functions."""
    by_file: dict[str, list[str]] = {}
    for (file, function), threads in found.items():
        by_file.setdefault(file, []).append(f"    {function}  ({', '.join(sorted(threads))})")
    print(f"\n{title}: {len(by_file)} files")
    for file, functions in by_file.items():
        print(file, *functions, sep="\n")
    return list(by_file)


def check_flow(heading: str, found: Functions, main: str) -> list[str]:
    """The files of the map's table under a heading, whose every step was passed on the thread that it names.

    `main` is the table's name for the main thread. Where it is the only one, the steps are in the order of the calls.
    """
    section = re.split(r"\n##", MAP.read_text(encoding="utf-8").partition(f"\n### {heading}\n")[2])[0]
    steps = list(STEP.finditer(section))
    assert steps, f"{MAP.name} has no steps under {heading!r}"
    names = {"MainThread": main, "starling-serving-loop": "serving loop"}
    for step in steps:
        threads = found.get((step["file"], step["function"]), set())
        assert threads, f"{heading}: {step['function']} of {step['file']} was not passed"
        assert step["thread"] in {names.get(name, "worker") for name in threads}, f"{step[0]} runs on {threads}"
    if {step["thread"] for step in steps} == {main}:
        first_calls = [list(found).index((step["file"], step["function"])) for step in steps]
        assert first_calls == sorted(first_calls)
    return [step["file"] for step in steps]


def test_a_token_passes_few_files_and_the_map_has_them_all(tiny_bundle: Path) -> None:
    found = token_functions(tiny_bundle)
    files = files_of("token", found)
    assert len(files) <= TOKEN_FILES
    assert set(check_flow("A token of `generate`", found, "caller")) == set(files)


def test_a_streamed_chat_request_passes_the_files_and_threads_of_the_map(tiny_bundle: Path) -> None:
    found = chat_functions(tiny_bundle)
    assert len(files_of("chat", found)) <= CHAT_FILES
    check_flow("A streamed chat request of `serve`", found, "event loop")


@pytest.mark.slow
def test_an_export_passes_the_files_of_the_map(tmp_path: Path) -> None:
    found = export_functions(tmp_path / "out")
    files = files_of("export", found)
    assert len(files) <= EXPORT_FILES
    assert len([file for file in files if not file.startswith(("engine/", "export/check/"))]) <= EXPORT_ALONE_FILES
    check_flow("An export", found, "caller")

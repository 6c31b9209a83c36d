"""Renders chat templates in a process of their own, which is ended where a template takes too long or too much."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

from starling.engine.errors import StarlingError

#: Seconds that one template may take to compile or to render, and bytes of its process's address space.
TIME_LIMIT_S = 10.0
MEMORY_LIMIT = 2**30
_SCRIPT = Path(__file__).with_name("template_process.py")
#: The packages that the process imports.
_PACKAGES = ("jinja2", "markupsafe")


class TemplateRefused(Exception):
    """A template that cannot be compiled or rendered; the message says why. `line`: of a mistake in its syntax."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


class TemplateRenderer:
    """The process, started when it is first needed and again after it was ended. Thread-safe: one job at a time."""

    def __init__(self, *, seconds: float = TIME_LIMIT_S, memory: int = MEMORY_LIMIT) -> None:
        self._seconds, self._memory = seconds, memory
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        #: Who started it: a forked child may not write into its parent's pipes.
        self._owner = 0

    def compile(self, source: str) -> None:
        """Raises TemplateRefused for what is no Jinja."""
        self._ask({"source": source}, most=0)

    def render(self, source: str, scope: Mapping[str, Any], *, most: int) -> str:
        """The text of a template, of at most `most` characters; `scope` has strings, numbers, lists and mappings.

        Raises TemplateRefused.
        """
        return self._ask({"source": source, "scope": scope, "most": most}, most=most)

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _ask(self, job: Mapping[str, Any], *, most: int) -> str:
        try:
            line = json.dumps(job).encode() + b"\n"
        except (ValueError, RecursionError) as error:
            raise TemplateRefused(f"its variables cannot be handed over: {error}") from None
        with self._lock:
            said = self._exchange(line, most)
        if said is None:
            limits = f"{self._seconds:g} s or {self._memory / 2**30:g} GiB"
            raise TemplateRefused(f"it takes more than {limits}, or ends the process that it runs in")
        if "syntax" in said:
            raise TemplateRefused(said["syntax"][1], line=said["syntax"][0])
        if "too_long" in said:
            raise TemplateRefused(f"its text has {said['too_long']:,} characters, more than the {most:,} that fit")
        if "refused" in said:
            raise TemplateRefused(said["refused"])
        text: str = said["text"]
        return text

    def _exchange(self, line: bytes, most: int) -> dict[str, Any] | None:
        """What the process says to a job; None where it ended instead."""
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        answer = b""
        try:
            process.stdin.write(line)
            process.stdin.flush()
            # A character is 12 bytes at most; what is longer is no answer.
            answer = process.stdout.readline(12 * most + 2**16)
        except BrokenPipeError:
            pass
        finally:
            # Interrupted in between, the next job would get this one's answer.
            if not answer.endswith(b"\n"):
                self._end()
        said: dict[str, Any] | None = json.loads(answer) if answer.endswith(b"\n") else None
        return said

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._owner != os.getpid():
            if not sys.executable:
                raise StarlingError(
                    "chat templates run in a process of Python's, but sys.executable is not set: set it"
                )
            self._process, self._owner = _start(self._seconds, self._memory), os.getpid()
            atexit.register(self.close)
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            atexit.unregister(self.close)
            process.kill()
            process.communicate()


def _start(seconds: float, memory: int) -> subprocess.Popen[bytes]:
    found = [find_spec(package) for package in _PACKAGES]
    folders = dict.fromkeys(str(Path(spec.origin).parents[1]) for spec in found if spec is not None and spec.origin)
    # Isolated: neither the working folder nor PYTHONPATH says what is imported. A group of its own: Ctrl-C on the
    # terminal reaches us alone.
    command = [sys.executable, "-I", "-S", str(_SCRIPT), str(seconds), str(memory), *folders]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        process_group=0 if os.name == "posix" else None,
    )


#: The one that all bundles of a program share.
SHARED = TemplateRenderer()

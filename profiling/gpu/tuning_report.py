"""What a tuning of the CUDA kernels has found: lines of JSON that outlive a variant which takes the card down."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starling.profiling.gpu.card import Target

_STALL_S = 20.0  # without a result: the card hangs


class TuningReport:
    """JSON lines on stdout and in a file, which a program that starts anew reads."""

    def __init__(self, path: Path, seconds: float, start: float, target: Target, module: str) -> None:
        """`start` is when the program first began, `module` what is run again where the card went down."""
        self.target, self._module = target, module
        self.path, self.end, self.start = path, start + seconds, start
        self.beat = time.time()
        self.current = ""
        lines = path.read_text().splitlines() if path.exists() else []
        self.earlier = [json.loads(line) for line in lines]
        self.known = {line["key"]: line for line in self.earlier if "key" in line}

    def write(self, event: str, **fields: Any) -> dict[str, Any]:
        """A line, which is returned as it was written."""
        line = {"event": event, **fields, "at_s": round(time.time() - self.start, 1)}
        text = json.dumps(line)
        print(text, flush=True)
        with self.path.open("a") as file:
            file.write(text + "\n")
        self.beat = time.time()
        return line

    def left_s(self) -> float:
        """Seconds until the time is over."""
        return self.end - time.time()

    def attempt(self, key: str, event: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """The line of `work`, from before where it is there; None where it fails or time is over."""
        if key in self.known:
            return self.known[key] if self.known[key]["event"] == event else None
        if self.left_s() < 1.0:
            return None
        self.current, self.beat = key, time.time()
        try:
            line = self.write(event, key=key, **work())
        except Exception as error:
            line = self.write("error", key=key, error=f"{type(error).__name__}: {error}"[:300])
            if self.target.is_card and not _is_alive(self.target):
                self.restart()
            line = None
        self.current = ""
        return line

    def restart(self) -> None:
        """Anew, without what was being tried."""
        self.write("fatal", key=self.current)
        self.target.close()
        again = ["-m", self._module, *sys.argv[1:], "--started", str(self.start)]
        os.execv(sys.executable, [sys.executable, *again])

    def watch(self) -> None:
        """Ends a hang, from a thread of its own."""
        while True:
            time.sleep(1.0)
            if self.left_s() < -5:
                self.write("stopped", reason="time is over and something still runs")
                os._exit(3)
            if self.target.is_card and self.current and time.time() - self.beat > _STALL_S:
                self.restart()


def _is_alive(target: Target) -> bool:
    try:
        target.synchronize()
    except Exception:
        return False
    return True

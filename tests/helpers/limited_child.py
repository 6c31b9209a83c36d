"""Runs a piece of work in a forked process with limits, and says how it ended. For programs without other threads."""

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from starling.cli.shared.failures import describe

MEMORY = 8 * 2**30  # of addresses: PyTorch alone maps 3 GB
MOST_RSS_MIB = 3000
CRASH = 98
#: How the command line calls what is raised and was not meant to be.
UNEXPECTED = "unexpected "


@dataclass(frozen=True)
class Outcome:
    """`code` is the exit code, negative for a signal; `bad` a word for what must not happen, else ""."""

    code: int
    bad: str
    text: str


def run_limited(work: Callable[[], object], log: Path, *, seconds: float) -> Outcome:
    """Run `work` as the command line would: what Starling raises on purpose is a line, anything else a fault."""
    child = os.fork()
    if child == 0:
        _run(work, log, seconds)
    begin, status = time.monotonic(), None
    while time.monotonic() - begin < seconds:
        ended, status, used = os.wait4(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.005)
    else:
        os.kill(child, signal.SIGKILL)
        _, _, used = os.wait4(child, 0)
        status = None
    content = log.read_bytes()
    text = (content[:1000] + content[1000:][-3000:]).decode("utf-8", "replace")
    code = 0 if status is None else os.waitstatus_to_exitcode(status)
    return Outcome(code, _fault(status, code, used.ru_maxrss // 1024, text), text)


def _fault(status: int | None, code: int, rss: int, text: str) -> str:
    if status is None:
        return "hang"
    if code < 0:
        return f"signal {-code}"
    if "Traceback" in text or code == CRASH:
        return "traceback"
    if f"error: {UNEXPECTED}" in text:
        return "unexpected"
    if rss > MOST_RSS_MIB:
        return "memory"
    return "leak" if "root:x:0" in text else ""


def _run(work: Callable[[], object], log: Path, seconds: float) -> None:
    code = CRASH
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (descriptor, 1), (descriptor, 2)):
            os.dup2(source, target)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            work()
            code = 0
        except Exception as error:
            line, code = describe(error)
            print("error:", line)
            if line.startswith(UNEXPECTED):
                traceback.print_exc()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)

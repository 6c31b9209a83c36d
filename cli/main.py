"""`starling`: the entry point. It is short, so that Ctrl-C and a full stderr are in hand before anything is loaded."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 a failure, 2 a user's mistake, 130 Ctrl-C, 143 SIGTERM."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        # Python's own would raise KeyboardInterrupt somewhere inside an import.
        signal.signal(signal.SIGINT, _leave)
    from starling.cli.command_group import run

    try:
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, before)
        return run(arguments)
    except KeyboardInterrupt:  # outside of any command
        _leave()


def _leave(number: int = signal.SIGINT, frame: FrameType | None = None) -> NoReturn:
    try:
        os.write(2, b"error: interrupted\n")
    finally:
        os._exit(INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())

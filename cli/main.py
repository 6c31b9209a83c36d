"""`starling`: the entry point. Commands are loaded when used; every failure becomes one line and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from types import FrameType
from typing import NoReturn

import click

from starling import __version__
from starling.cli.shared.failures import describe
from starling.engine.errors import did_you_mean

COMMANDS = (
    *("export", "build", "generate", "chat", "serve", "batch", "triton"),
    *("tokenize", "verify", "profile", "evaluate", "inspect", "doctor"),
)
INTERRUPTED = 130


@dataclass(slots=True)
class Session:
    """What the global options set, for the commands and for `main`."""

    debug: bool = False


class LazyGroup(click.Group):
    """Imports a command's module when the command is asked for: `starling.cli.NAME` holds it as `command`."""

    def list_commands(self, context: click.Context) -> list[str]:
        """The commands in the order of their use."""
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """The command of that name, None where there is none."""
        if name not in COMMANDS:
            return None
        command: click.Command = import_module(f"starling.cli.{name}").command
        return command

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the arguments begin with; a usage error that names the nearest one for any other."""
        name = args[0]
        if not (name in COMMANDS or name.startswith("-") or context.resilient_parsing):
            raise click.UsageError(f"No such command {name!r}{did_you_mean(name, COMMANDS)}", context)
        return super().resolve_command(context, args)


@click.group(cls=LazyGroup, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="starling")
@click.option("--debug", is_flag=True, help="Show the traceback of a failure.")
@click.pass_context
def starling(context: click.Context, debug: bool) -> None:
    """Run decoder LLMs with ONNX Runtime and TensorRT: export a checkpoint to a bundle, generate from it, measure it.

    \b
    Examples:
      starling export demo smollm2
      starling generate smollm2 "What is the capital of South Korea?"
      starling profile smollm2
    """
    context.obj.debug = debug
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 a failure, 2 a user's mistake, 130 Ctrl-C, 143 SIGTERM."""
    session = Session()
    _stop_cleanly_on_signals()
    _never_fail_to_print()
    try:
        result = starling.main(arguments, prog_name="starling", standalone_mode=False, obj=session)
        return result if isinstance(result, int) else 0
    except click.Abort:
        return _fail("interrupted", INTERRUPTED)
    except Exception as error:
        message, code = describe(error)
        if session.debug:
            traceback.print_exception(error)
            return code
        return _fail(message, code)
    finally:
        _finish_output()


def _fail(message: str, code: int) -> int:
    click.echo(f"error: {' '.join(message.split())}", err=True)
    return code


def _stop_cleanly_on_signals() -> None:
    """Let `finally` blocks run when the process gets a signal to end: an export then leaves nothing behind."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:  # nohup's choice is respected
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _never_fail_to_print() -> None:
    """A terminal that lacks a character gets a replacement, not a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _finish_output() -> None:
    """Flush while a reader that has gone away can still be ignored; the interpreter would complain about it."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())

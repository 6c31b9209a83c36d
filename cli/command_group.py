"""`starling` and its commands, which are loaded when used; every failure becomes one line and an exit code."""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from threading import Timer, main_thread
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import click

from starling import __version__
from starling.cli.shared.failures import FAILURE, describe
from starling.engine.errors import did_you_mean

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

COMMANDS = (
    *("export", "build", "generate", "chat", "score", "serve", "batch", "triton"),
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


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    session = Session()
    _stop_cleanly_on_signals()
    _never_fail_to_print()
    try:
        result = starling.main(arguments, prog_name="starling", standalone_mode=False, obj=session)
        code = result if isinstance(result, int) else 0
    except click.Abort:
        code = _fail("interrupted", INTERRUPTED)
    except Exception as error:
        message, code = _interrupted(error) or describe(error)
        if session.debug:
            traceback.print_exception(error)
        else:
            _fail(message, code)
    finally:
        lost = _finish_output()
    return code if lost is None else _fail(describe(lost)[0], code or FAILURE)


def _fail(message: str, code: int) -> int:
    click.echo(f"error: {' '.join(message.split())}", err=True)
    return code


#: Signals that came, the newest last.
_RECEIVED: list[int] = []
_SEND_AGAIN_S = 0.01


def _stop_cleanly_on_signals() -> None:
    """Let `finally` blocks run when the process gets a signal to end: an export then leaves nothing behind."""
    for name, usual in (
        ("SIGTERM", signal.SIG_DFL),
        ("SIGHUP", signal.SIG_DFL),
        ("SIGINT", signal.default_int_handler),
    ):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is usual:  # nohup's choice is respected
            signal.signal(number, _end)
    if hasattr(signal, "pthread_kill"):
        sys.unraisablehook = partial(_send_again, sys.unraisablehook)


def _send_again(usual: Callable[[sys.UnraisableHookArgs], object], unraisable: sys.UnraisableHookArgs) -> None:
    """Python drops what a signal raises in a destructor: the signal comes again, once that has ended."""
    if _RECEIVED and isinstance(unraisable.exc_value, (SystemExit, KeyboardInterrupt)):
        # To the main thread, whose waiting it ends.
        Timer(_SEND_AGAIN_S, signal.pthread_kill, (main_thread().ident, _RECEIVED[-1])).start()
    else:
        usual(unraisable)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    _RECEIVED.append(number)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


def _interrupted(error: BaseException | None) -> tuple[str, int] | None:
    """Message and code, where the failure is what a library made of the exception that a signal raised in it."""
    if not _RECEIVED:
        return None
    # A chat goes on after Ctrl-C, and may fail later for a reason of its own. No command goes on after the others.
    if _RECEIVED[-1] == signal.SIGINT:
        while error is not None and not isinstance(error, (ImportError, KeyboardInterrupt)):
            error = error.__cause__ or error.__context__
    return None if error is None else ("interrupted", 128 + _RECEIVED[-1])


def _never_fail_to_print() -> None:
    """A terminal that lacks a character gets a replacement, and a stderr that takes nothing (a full disk, a reader that
    is gone) ends no command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    if isinstance(sys.stderr, io.TextIOWrapper) and sys.stderr is sys.__stderr__:
        raw = _Forgiving(sys.stderr.fileno(), "wb", closefd=False)
        encoding = sys.stderr.encoding
        sys.stderr = io.TextIOWrapper(io.BufferedWriter(raw), encoding, "replace", line_buffering=True)


class _Forgiving(io.FileIO):
    def write(self, data: Buffer, /) -> int:
        """Write what can be written; the rest is lost."""
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def _finish_output() -> OSError | None:
    """Flush while a reader that has gone away can still be ignored; the interpreter would complain about it.

    What else went wrong, a full disk for example.
    """
    lost = None
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        lost = None if isinstance(error, BrokenPipeError) else error
    return lost

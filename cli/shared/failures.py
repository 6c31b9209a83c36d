"""From an exception to the one line and the exit code that the user gets."""

from __future__ import annotations

import errno

import click

from starling.cli.shared.extras import WHAT_FOR, extra_of
from starling.engine.errors import StarlingError, did_you_mean
from starling.engine.installation import install_command

FAILURE = 1


def describe(error: Exception) -> tuple[str, int]:
    """The message and the exit code of an exception: 2 for a user's mistake, 1 for anything else."""
    if isinstance(error, StarlingError):
        return str(error), error.exit_code
    if isinstance(error, click.ClickException):
        return _usage(error), error.exit_code
    if isinstance(error, ModuleNotFoundError):
        return _missing_module(error), FAILURE
    if isinstance(error, MemoryError):
        detail = f" ({error})" if str(error) else ""
        return f"out of memory{detail}: free some, or ask for less (--max-seq, a smaller model or dtype)", FAILURE
    if isinstance(error, OSError) and error.errno is not None:
        return _system(error), FAILURE
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"unexpected {what}; run `starling --debug …` for the traceback and report it", FAILURE


def _usage(error: click.ClickException) -> str:
    context = error.ctx if isinstance(error, click.UsageError) else None
    message = error.format_message().rstrip(".")
    if isinstance(error, click.NoSuchOption):  # click's own suggestions would name the hidden options too
        message = f"No such option {error.option_name!r}{_near_options(error.option_name, context)}"
    return message if context is None else f"{message}; see: {context.command_path} --help"


def _near_options(name: str, context: click.Context | None) -> str:
    options = () if context is None else context.command.get_params(context)
    shown = [option for option in options if isinstance(option, click.Option) and not option.hidden]
    return did_you_mean(name, (text for option in shown for text in (*option.opts, *option.secondary_opts)))


def _missing_module(error: ModuleNotFoundError) -> str:
    package = (error.name or "").partition(".")[0]
    extra = extra_of(package)
    if extra is not None:
        what = f"{WHAT_FOR[extra]} needs the package {package}"
        return f"{what}, which is not installed: {install_command(extra)}"
    return f"the package {package or error} is not installed: {install_command(None, '--force-reinstall')}"


def _system(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    hint = "; free space and retry" if error.errno == errno.ENOSPC else ""
    return f"{where}{error.strerror}{hint}"

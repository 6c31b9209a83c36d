"""`starling chat`: a conversation in the terminal, or piped, one line a turn."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from starling.cli.shared.grammar_options import grammar_of, grammar_options
from starling.cli.shared.options import (
    bundle_argument,
    draft_option,
    engine_options,
    engine_settings,
    sampling_options,
    speculation_option,
    speculation_settings,
)
from starling.cli.shared.options import sampling_params as params_of
from starling.cli.shared.output import decode_utf8, note
from starling.cli.shared.result_output import cache_figure, figures, note_backend
from starling.cli.shared.streaming import print_stream
from starling.engine.errors import PromptError

if TYPE_CHECKING:
    from starling.engine.chat_session import ChatSession
    from starling.engine.engine import Engine
    from starling.engine.generation.sampling_params import SamplingParams

HELP = "/reset forgets the conversation, /exit or Ctrl-D ends, Ctrl-C stops a reply"


@click.command()
@bundle_argument
@click.option("--system", help="System message of the chat.")
@click.option("--template", help="Chat template by name, for example code.")
@sampling_options
@grammar_options
@engine_options
@speculation_option
@draft_option
@click.option("--verbose", is_flag=True, help="Show figures for each reply: tokens reused and prefilled, TTFT, speed.")
def command(bundle: Path, system: str | None, template: str | None, verbose: bool, **options: Any) -> None:
    """Talk with the model: each line of stdin is a turn, each reply streams to stdout.

    A turn prefills only what the KV cache does not hold yet. /reset forgets the conversation, /exit or Ctrl-D ends it,
    Ctrl-C stops a reply and keeps what was said.

    \b
    Examples:
      starling chat smollm2
      starling chat smollm2 --system "You answer in one sentence." --verbose
      printf 'Hello\\nWhat did I just say?\\n' | starling chat smollm2
    """
    params = params_of(options, grammar=grammar_of(options))
    from starling.engine.engine import Engine

    with Engine(bundle, **engine_settings(options), **speculation_settings(options)) as engine:
        note_backend(engine)
        interactive = sys.stdin.isatty()
        if interactive:
            note(f"{cache_figure(engine)}; {HELP}")
        session = engine.chat(system, template)
        while (line := _read_line(interactive)) is not None:
            if not _obey(line, session):
                break
            if line and not line.startswith("/"):
                _answer(engine, session, line, params, verbose=verbose, interactive=interactive)


def _read_line(interactive: bool) -> str | None:
    """The next line without spaces around it, None at the end of input."""
    while True:
        try:
            return _prompt() if interactive else _piped()
        except EOFError:
            if interactive:
                click.echo(err=True)  # the shell's prompt begins on a line of its own
            return None
        except KeyboardInterrupt:
            if not interactive:
                raise
            note(f"\n{HELP}")


def _prompt() -> str:
    import readline  # noqa: F401 (gives `input` a history and editing)

    return input("> ").strip()


def _piped() -> str:
    line = sys.stdin.buffer.readline()
    if not line:
        raise EOFError
    return decode_utf8(line, "stdin").strip()


def _obey(line: str, session: ChatSession) -> bool:
    """Do what a line with a slash says; False ends the chat."""
    if line == "/reset":
        session.reset()
        note("the conversation is forgotten")
    elif line.startswith("/") and line != "/exit":
        note(f"unknown command {line.split()[0]}: {HELP}")
    return line != "/exit"


def _answer(
    engine: Engine, session: ChatSession, text: str, params: SamplingParams, *, verbose: bool, interactive: bool
) -> None:
    try:
        result = print_stream(session.stream(text, params))
    except PromptError as error:
        if not interactive:
            raise
        click.echo(f"error: {error} (/reset starts anew)", err=True)
        return
    if verbose:
        reused = result.timings.reused_tokens
        note(f"{reused} prompt tokens reused, {result.timings.prefilled_tokens} prefilled · {figures(result, engine)}")
    elif result.finish_reason == "length":
        note("the reply was cut at --max-tokens or at the end of the KV cache")

"""`starling profile`: measure a bundle on this machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from starling.cli.options import backend_options, bundle_argument, json_option
from starling.cli.output import print_json
from starling.cli.results import note_backend
from starling.engine.errors import UserError


@click.command()
@bundle_argument
@click.option("--prompt-tokens", type=int, default=128, show_default=True, help="Length of each prompt.")
@click.option("--new-tokens", type=int, default=128, show_default=True, help="Tokens that each row generates.")
@click.option("--batch", type=int, default=1, show_default=True, help="Rows that decode together.")
@click.option("--repeats", type=int, default=5, show_default=True, help="Measured runs.")
@click.option("--warmup", type=int, default=1, show_default=True, help="Runs before them that do not count.")
@click.option("--max-seq", type=int, help="Positions of the KV cache.  [default: as many as the run needs]")
@backend_options
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the JSON document here too.")
@json_option
def command(
    bundle: Path,
    max_seq: int | None,
    backend: str,
    engine: str | None,
    threads: int | None,
    output: Path | None,
    as_json: bool,
    **counts: int,
) -> None:
    """Measure load time, TTFT, ITL, decode speed, host time, memory, and the memory bandwidth reached.

    Decoding is greedy and goes on behind end tokens, so every run has the same length. The machine's own read bandwidth
    is measured in the same run.

    \b
    Examples:
      starling profile smollm2
      starling profile smollm2 --prompt-tokens 1024 --new-tokens 256 --repeats 3
      starling profile smollm2 --batch 4 --threads 2
      starling profile smollm2 --json > figures.json
    """
    if output is not None and not output.absolute().parent.is_dir():  # found out now rather than after minutes
        raise UserError(f"{output.parent} is no folder: choose another --output")
    from starling.engine.bundle import Bundle
    from starling.engine.engine import Engine
    from starling.profiling.profile import ProfileSettings, measure, profile_json

    settings = ProfileSettings(**counts)
    opened = Bundle.open(bundle)
    positions = settings.positions(opened, max_seq)
    sizes: dict[str, Any] = {"max_seq": positions, "max_batch": settings.batch, "threads": threads}
    with _progress() as progress, Engine(opened, backend=backend, engine=engine, **sizes) as running:
        note_backend(running)
        profile = measure(running, settings, threads=threads, progress=progress)
    document = profile_json(profile, opened)
    if output is not None:
        output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if as_json:
        print_json(document)
        return
    _render(profile, opened)


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Shows what is being run, on a terminal's last line."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    # Drawn only when the phase changes: a spinner's thread would take time from what is measured.
    try:
        yield lambda text: click.secho(f"\r\033[K{text} …", err=True, nl=False, dim=True)
    finally:
        click.echo("\r\033[K", err=True, nl=False)


def _render(profile: Any, bundle: Any) -> None:
    from rich.console import Console

    from starling.profiling.report import render

    console = Console()
    # Off a terminal rich assumes 80 columns and would fold the table.
    Console(width=None if console.is_terminal else 120).print(render(profile, bundle))

"""`python -m starling.profiling.peers.compare`: Starling beside other runtimes, same tokens, same threads, one run."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from starling.engine.backend import default_threads
from starling.engine.bundle import Bundle
from starling.engine.errors import StarlingError, UserError
from starling.engine.tokenizer import Tokenizer
from starling.profiling.machine import describe_machine
from starling.profiling.peers.contenders import OURS, Contender, contenders, opened
from starling.profiling.peers.measure import Run, measure
from starling.profiling.peers.summary import Summary, summarize, tables
from starling.profiling.prompts import prompt_tokens

#: A load average above this before we start means that somebody else is measured along.
BUSY_LOAD = 0.5


def environment(threads: int) -> dict[str, Any]:
    """The machine and the moment, for the report."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(describe_machine()),
        "load_average": round(load_average(), 2),
        "threads": threads,
        "system": platform.platform(),
    }


def load_average() -> float:
    """How many processes wanted a core during the last minute, 0 where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def report(
    bundle: Bundle, about: dict[str, Any], members: list[dict[str, Any]], runs: list[Run], summaries: list[Summary]
) -> dict[str, Any]:
    """The JSON of a comparison. Times in ms; see Run, Summary and precision.graph_precision for the fields."""
    return {
        "format": "starling-comparison",
        "format_version": 1,
        "environment": about,
        "bundle": {name: bundle.raw.get(name) for name in ("source", "dialect", "dtype", "quantization")},
        "contenders": members,
        "summaries": [asdict(summary) for summary in summaries],
        "runs": [asdict(run) for run in runs],
    }


def _lengths(context: click.Context, option: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        lengths = tuple(dict.fromkeys(int(part) for part in value.split(",")))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers; write for example 128,1024") from None
    if min(lengths) < 1:
        raise click.BadParameter(f"{min(lengths)} is not a prompt length; give 1 or more")
    return lengths


@click.command(context_settings={"show_default": True})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--peer-python", required=True, help="Python of an environment with onnxruntime-genai.")
@click.option(
    "--peer-model",
    "peer_models",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Folder the peer runs; repeatable.",
)
@click.option("--bundle-in-peer", is_flag=True, help="Let the peer run BUNDLE too, through its genai_config.json.")
@click.option("--prompt-tokens", "lengths", default="128,1024", callback=_lengths, help="Prompt lengths, by commas.")
@click.option("--new-tokens", default=128, type=click.IntRange(2), help="Greedy tokens of one run.")
@click.option("--threads", default=default_threads, type=click.IntRange(1), help="Threads of every contender.")
@click.option("--rounds", default=4, type=click.IntRange(1), help="Times that all contenders are started afresh.")
@click.option("--repeats", default=2, type=click.IntRange(1), help="Runs of each contender on each length in a round.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="JSON file for all figures.")
def main(
    bundle: Path,
    peer_python: str,
    peer_models: tuple[Path, ...],
    bundle_in_peer: bool,
    lengths: tuple[int, ...],
    new_tokens: int,
    threads: int,
    rounds: int,
    repeats: int,
    output: Path | None,
) -> None:
    """Measure BUNDLE in Starling beside onnxruntime-genai, taking turns on the same token ids.

    Example: python -m starling.profiling.peers.compare smollm2-int8 --peer-python genai/bin/python --peer-model
    genai-models/int8 --threads 2 --output int8.json
    """
    try:
        # Found out now rather than behind minutes of measuring.
        if output is not None and not output.absolute().parent.is_dir():
            raise UserError(f"{output.parent} is no folder; choose another --output")
        ours = Bundle.open(bundle)
        listed = contenders(ours, peer_python, peer_models, bundle_in_peer)
        document = compare(ours, listed, lengths, new_tokens, threads, (rounds, repeats))
    except StarlingError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    if output is not None:
        output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def compare(
    bundle: Bundle,
    listed: Sequence[Contender],
    lengths: Sequence[int],
    new_tokens: int,
    threads: int,
    times: tuple[int, int],
) -> dict[str, Any]:
    """Run the comparison, print its tables, and give the whole of it as a JSON document. Raises StarlingError.

    `times`: rounds, each with fresh processes, and repeats within one.
    """
    rounds, repeats = times
    tokenizer = Tokenizer.load(bundle.folder, bundle.architecture.vocab_size)
    about = environment(threads)
    if about["load_average"] > BUSY_LOAD:
        click.echo(f"The machine is busy (load {about['load_average']}): ratios may be off, times are.", err=True)
    runs: list[Run] = []
    for round_ in range(rounds):
        # Fresh processes: where a process's memory happens to lie makes it some 10 % faster or slower for its life.
        with ExitStack() as stack, Console(stderr=True).status("loading") as status:
            pairs = [stack.enter_context(opened(contender, threads, max(lengths) + new_tokens)) for contender in listed]
            runs += measure(
                [process for process, _ in pairs],
                lambda length, repeat: prompt_tokens(tokenizer, length, repeat),
                lengths,
                new_tokens,
                range(round_ * repeats, (round_ + 1) * repeats),
                status.update,
            )
    summaries = summarize(runs, OURS)
    settings = f"{threads} threads, {new_tokens} new tokens, {rounds} rounds of {repeats} repeats"
    _print(summaries, f"{bundle.folder.name} on {about['machine']['cpu']}, {settings}")
    return report(bundle, about, [member for _, member in pairs], runs, summaries)


def _print(summaries: Sequence[Summary], title: str) -> None:
    console = Console()
    console.print(title, soft_wrap=True, highlight=False)
    for table in tables(summaries):
        console.print(table, "")
    console.print("Medians of all repeats; ratios are ours / theirs, the median over pairs of one")
    console.print("repeat: we are faster above 1 in decode, below 1 in TTFT. Same tokens: repeats")
    console.print("in which the greedy tokens are ours, and @ the earliest token that is not.")


if __name__ == "__main__":
    main()

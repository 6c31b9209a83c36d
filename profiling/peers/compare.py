"""`python -m starling.profiling.peers.compare`: Starling beside other runtimes, same tokens, same threads, one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from starling.engine.bundle.manifest import Bundle
from starling.engine.divergence import Quality
from starling.engine.errors import UserError
from starling.engine.host import default_threads
from starling.engine.text.tokenizer import Tokenizer
from starling.profiling.exact_prompts import prompt_tokens
from starling.profiling.machine.environment import Environment, describe_environment
from starling.profiling.peers.chart import comparison_chart
from starling.profiling.peers.contenders import Contender, by_precision, in_genai, opened, our_contenders
from starling.profiling.peers.measure import Run, measure
from starling.profiling.peers.peer_divergence import measure_divergence, reference_of
from starling.profiling.peers.peers_file import read_peers
from starling.profiling.peers.summary import Summary, summarize, tables
from starling.profiling.programs import failing_in_one_line, write_document

#: A load average above this before we start means that somebody else is measured along.
BUSY_LOAD = 0.5


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured: `rounds`, each with fresh processes, and `repeats` of every prompt length within one.

    `quality` is measured on the first `quality_tokens` of the text (None: on all).
    """

    lengths: tuple[int, ...]
    new_tokens: int
    threads: int
    rounds: int
    repeats: int
    quality: bool
    quality_tokens: int | None


@dataclass(slots=True)
class Measured:
    """What a comparison found. `members` describe the contenders, `unscored` says why a quality is missing."""

    runs: list[Run]
    members: list[dict[str, Any]]
    reference: str | None
    qualities: Mapping[str, Quality]
    unscored: Mapping[str, str]


def _lengths(context: click.Context, option: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        lengths = tuple(dict.fromkeys(int(part) for part in value.split(",")))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers; write for example 128,1024") from None
    if min(lengths) < 1:
        raise click.BadParameter(f"{min(lengths)} is not a prompt length; give 1 or more")
    return lengths


@click.command(context_settings={"show_default": True})
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--peers", "folder", required=True, type=click.Path(path_type=Path), help="Folder of ...peers.install.")
@click.option("--only", help="Peers or contenders to take, by commas.  [default: all of our bundles' precisions]")
@click.option("--bundle-in-peer", is_flag=True, help="Let onnxruntime-genai run the bundles too.")
@click.option("--prompt-tokens", "lengths", default="128,1024", callback=_lengths, help="Prompt lengths, by commas.")
@click.option("--new-tokens", default=128, type=click.IntRange(2), help="Greedy tokens of one run.")
@click.option("--threads", default=default_threads, type=click.IntRange(1), help="Threads of every contender.")
@click.option("--rounds", default=5, type=click.IntRange(1), help="Times that all contenders are started afresh.")
@click.option("--repeats", default=1, type=click.IntRange(1), help="Runs of each contender on each length in a round.")
@click.option("--quality/--no-quality", default=True, help="Measure everybody's KL to the model at fp32, too.")
@click.option("--quality-tokens", type=click.IntRange(2), help="Read no more of the text for it.  [default: all]")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="JSON file; a chart (.svg) beside it.")
def main(
    bundles: tuple[Path, ...],
    folder: Path,
    only: str | None,
    bundle_in_peer: bool,
    output: Path | None,
    **plan: Any,
) -> None:
    """Measure BUNDLES in Starling beside the peers of a folder, taking turns on the same token ids.

    A peer's model is compared with the first bundle of the same precision.

    \b
    Example:
      python -m starling.profiling.peers.install peers
      python -m starling.profiling.peers.compare smollm2 smollm2-int8 smollm2-int4 --peers peers --output peers.json
    """
    with failing_in_one_line():
        # Found out now rather than after minutes of measuring.
        if output is not None and not output.absolute().parent.is_dir():
            raise UserError(f"{output.parent} is no folder; choose another --output")
        ours = [Bundle.open(bundle) for bundle in bundles]
        document = compare(ours, read_peers(folder), only, Plan(**plan), bundle_in_peer=bundle_in_peer)
    write_document(document, output)
    if output is not None:
        output.with_suffix(".svg").write_text(comparison_chart(document), encoding="utf-8")


def compare(
    bundles: Sequence[Bundle],
    peers: Sequence[Contender],
    only: str | None,
    plan: Plan,
    *,
    bundle_in_peer: bool = False,
) -> dict[str, Any]:
    """Run the comparison, print its tables, and give the whole of it as a JSON document. Raises StarlingError."""
    ours = our_contenders(bundles, peers[0].device if peers else "cpu")
    others = [*chosen(peers, only), *(in_genai(ours, peers) if bundle_in_peer else [])]
    groups = by_precision(ours, others)
    about = describe_environment()
    if about.load_average is not None and about.load_average[0] > BUSY_LOAD:
        load = f"{about.load_average[0]:.2f}"
        click.echo(f"The machine is busy (load {load}): ratios may be off, times are.", err=True)
    with Console(stderr=True).status("loading") as status:
        found = _measure(bundles[0], groups, plan, status.update)
        if plan.quality and (reference := reference_of(ours, peers)) is not None:
            everybody = [contender for group in groups.values() for contender in group]
            found.reference = reference.name
            found.qualities, found.unscored = measure_divergence(
                bundles[0], everybody, reference, plan.threads, status.update, plan.quality_tokens
            )
    summaries = summarize(found.runs, {precision: [one.name for one in group] for precision, group in groups.items()})
    _print(summaries, found, f"{bundles[0].source['name']} on {about.machine['cpu']}, {_settings(plan)}")
    return report(bundles, about, plan, found, summaries)


def chosen(peers: Sequence[Contender], only: str | None) -> list[Contender]:
    """The contenders named in `only` by their own or their peer's name. Raises UserError for a name that is neither."""
    if only is None:
        return list(peers)
    names = only.split(",")
    known = {name for one in peers for name in (one.name, one.peer)}
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--only {unknown[0]!r} is not set up; there are {', '.join(one.name for one in peers)}")
    return [one for one in peers if one.name in names or one.peer in names]


def _measure(
    bundle: Bundle, groups: Mapping[str, Sequence[Contender]], plan: Plan, progress: Callable[[str], None]
) -> Measured:
    tokenizer = Tokenizer.load(bundle.folder, bundle.architecture.vocab_size)
    found = Measured([], [], None, {}, {})
    for round_ in range(plan.rounds):
        for group in groups.values():
            # Fresh processes: where a process's memory happens to lie makes it some 10 % faster or slower for its life.
            with ExitStack() as stack:
                capacity = max(plan.lengths) + plan.new_tokens
                pairs = [stack.enter_context(opened(contender, plan.threads, capacity)) for contender in group]
                found.members += [member for _, member in pairs] if round_ == 0 else []
                found.runs += measure(
                    [process for process, _ in pairs],
                    lambda length, start: prompt_tokens(tokenizer, length, start),
                    plan.lengths,
                    plan.new_tokens,
                    range(round_ * plan.repeats, (round_ + 1) * plan.repeats),
                    progress,
                )
    return found


def report(
    bundles: Sequence[Bundle], about: Environment, plan: Plan, found: Measured, summaries: Sequence[Summary]
) -> dict[str, Any]:
    """The JSON of a comparison. Times in ms; see Plan, Run, Summary, Quality and graph_precision for the fields."""
    described = ("source", "dialect", "dtype", "quantization")
    return {
        "format": "starling-peer-comparison",
        "format_version": 1,
        "environment": asdict(about),
        "plan": asdict(plan),
        "bundles": [{name: bundle.raw.get(name) for name in described} for bundle in bundles],
        "contenders": found.members,
        "summaries": [asdict(summary) for summary in summaries],
        "quality_reference": found.reference,
        "quality": {name: asdict(quality) for name, quality in found.qualities.items()},
        "quality_failures": dict(found.unscored),
        "runs": [asdict(run) for run in found.runs],
    }


def _settings(plan: Plan) -> str:
    return f"{plan.threads} threads, {plan.new_tokens} new tokens, {plan.rounds} rounds of {plan.repeats} repeats"


def _print(summaries: Sequence[Summary], found: Measured, title: str) -> None:
    console = Console()
    console.print(title, soft_wrap=True, highlight=False)
    for table in tables(summaries, found.qualities):
        console.print(table, "")
    console.print("Medians of all repeats; ratios are ours / theirs, the median over pairs of one")
    console.print("repeat: we are faster above 1 in decode, below 1 in TTFT. Same tokens: repeats")
    console.print("in which the greedy tokens are ours, and @ the earliest token that is not.")
    if found.reference is not None:
        console.print(f"Mean KL in nats, to {found.reference}, on the text of starling evaluate.", highlight=False)
    for name, line in found.unscored.items():
        console.print(f"No quality of {name}: {line}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()

"""`starling profile`: measure a bundle on this machine, and compare two measurements."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from starling.cli.shared.completion import BundlePath
from starling.cli.shared.options import (
    backend_options,
    check_backend,
    given_options,
    json_option,
    kv_dtype_option,
    speculation_option,
)
from starling.cli.shared.output import note, print_json, screen_width
from starling.cli.shared.progress_bar import progress_on_stderr
from starling.engine.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType


Document = dict[str, Any]
#: Columns of a report in a pipe or a file, which have no width of their own; and the fewest that one is laid out for.
PIPED_WIDTH, LEAST_WIDTH = 120, 40


class Counts(click.ParamType[tuple[int, ...]]):
    """Whole numbers with commas between them: 128,1024."""

    name = "N[,N…]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """The numbers; a usage error for anything else."""
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        if not all(re.fullmatch("-?[0-9]{1,12}", part) for part in parts):
            self.fail(f"{value!r} is not a list of whole numbers like 128,1024", param, ctx)
        return tuple(map(int, parts))


@click.command()
@click.argument("bundle", type=BundlePath(path_type=Path), required=False)
@click.option("--prompt-tokens", type=Counts(), default="128", show_default=True, help="Length of each prompt.")
@click.option(
    "--new-tokens", type=Counts(), default="48", show_default=True, help="Tokens that each prompt is answered with."
)
@click.option(
    "--batch",
    type=Counts(),
    default="1",
    show_default=True,
    help="Batch sizes to measure: prompts that run together. The largest is what serve has as --max-batch.",
)
@click.option("--repeats", type=int, default=5, show_default=True, help="Measured runs of each combination.")
@click.option("--warmup", type=int, default=1, show_default=True, help="Runs before them that do not count.")
@click.option("--max-seq", type=int, help="Positions of the KV cache.  [default: as many as the longest run needs]")
@backend_options
@kv_dtype_option
@speculation_option
@click.option("--operators", is_flag=True, help="Time every operator too, grouped by the part of the layer.")
@click.option("--cold-start/--no-cold-start", default=True, show_default=True, help="Time a fresh process too.")
@click.option("--nvtx", is_flag=True, help="Mark prefill and decode with NVTX ranges (package nvtx).")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the JSON document here too.")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write a report with charts here.")
@click.option(
    "--compare",
    nargs=2,
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="A.json B.json",
    help="Measure nothing; say how B differs from A, and which differences are larger than their noise.",
)
@json_option
def command(
    bundle: Path | None,
    output: Path | None,
    html: Path | None,
    compare: tuple[Path, Path] | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Measure TTFT, ITL, TPOT, request latency, host time, cold start, memory, and the share of the machine's limits.

    Decoding is greedy and goes on after end tokens, so every run has the same length. Lists make a sweep over all
    their combinations. The machine's own read bandwidth and arithmetic peak are measured in the same run.

    \b
    Examples:
      starling profile smollm2
      starling profile smollm2 --prompt-tokens 128,1024 --batch 1,4 --output a.json --html a.html
      starling profile smollm2 --operators --threads 2
      starling profile smollm2 --speculation prompt-lookup --prompt-tokens 512
      starling profile --compare a.json b.json
    """
    if compare:
        _refuse_to_measure(bundle)
        _compare(*compare, as_json=as_json)
        return
    check_backend(settings)
    if bundle is None:
        raise UserError("no BUNDLE is given: starling profile BUNDLE, or --compare A.json B.json")
    for file in (output, html):
        if file is not None and not file.absolute().parent.is_dir():  # found out now rather than after minutes
            raise UserError(f"{file.parent} is no folder: choose another --{'output' if file is output else 'html'}")
    document = _measure(bundle, settings)
    if output is not None:
        output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if html is not None:
        from starling.profiling.reports.html_report import html_report

        html.write_text(html_report(document), encoding="utf-8")
    if as_json:
        print_json(document)
        return
    from starling.profiling.reports.terminal_report import render

    _print(render(document))
    for file in (output, html):
        if file is not None:
            note(f"written: {file}")


def _measure(folder: Path, settings: Mapping[str, Any]) -> Document:
    from starling.engine.bundle.manifest import Bundle
    from starling.profiling.latency.sweep import Options, measure
    from starling.profiling.latency.sweep_settings import Sweep
    from starling.profiling.reports.profile_document import profile_document

    counts = ("prompt_tokens", "new_tokens", "batch", "repeats", "warmup")
    sweep = Sweep(**{name: settings[name] for name in counts})
    options = Options(**{name: value for name, value in settings.items() if name not in counts})
    with progress_on_stderr(refresh=False) as progress:
        profile = measure(
            Bundle.open(folder).require("generate"), sweep, options, progress, lambda text: note(f"warning: {text}")
        )
    for text in (profile.note, profile.kernels_note):
        if text is not None:
            note(text)
    return profile_document(profile)


def _refuse_to_measure(bundle: Path | None) -> None:
    """Raises UserError where --compare stands beside what it would have to leave undone."""
    own, options = (None, "bundle", "compare", "as_json"), click.get_current_context().command.params
    others = list(given_options(option.name for option in options if option.name not in own))
    if bundle is not None:
        others.insert(0, str(bundle))
    if others:
        raise UserError(f"--compare measures nothing: leave {', '.join(others)} out")


def _compare(before: Path, after: Path, *, as_json: bool) -> None:
    from starling.profiling.reports.comparison import compare, comparison_document
    from starling.profiling.reports.comparison_report import render_comparison
    from starling.profiling.reports.profile_document import read_profile

    comparison = compare(read_profile(before), read_profile(after))
    if as_json:
        print_json(comparison_document(comparison))
        return
    _print(render_comparison(comparison, str(before), str(after)))


def _print(content: RenderableType) -> None:
    from rich.console import Console

    Console(width=max(screen_width() or PIPED_WIDTH, LEAST_WIDTH)).print(content)

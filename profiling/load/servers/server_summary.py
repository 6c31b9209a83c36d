"""What one server gave under one load in one round, the medians over the rounds, and the tables that a person reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median

from rich import box
from rich.table import Table

from starling.profiling.distribution import distribution
from starling.profiling.load.servers.server_loads import OWN, PREFIX, UNSHARED, Load
from starling.profiling.load.servers.server_process import Stream

TITLES = {"unshared": f"{UNSHARED} prompt tokens", "shared": f"{PREFIX} known prompt tokens + {OWN} own"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Figures:
    """Of one server under one load. Times in ms, percentiles over all streams and all gaps between their pieces.

    Tokens per second are of all streams, from the first request to the last piece. `alike` is the share of an answer up
    to the first character that is not ours, the mean over the streams.
    """

    server: str
    prompts: str
    streams: int
    tokens_per_s: float
    ttft_p50_ms: float
    ttft_p95_ms: float
    ttft_p99_ms: float
    itl_p50_ms: float
    itl_p95_ms: float
    itl_p99_ms: float
    alike: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRun(_Figures):
    """What one server gave under one load in one round."""

    round: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSummary(_Figures):
    """Medians over the rounds; a ratio is the median over the rounds of our figure / this server's, of one round each.

    Above 1 is our gain in tokens per second, below 1 in times.
    """

    tokens_ratio: float
    ttft_p95_ratio: float
    itl_p95_ratio: float


def load_run(
    server: str, load: Load, round_: int, streams: Sequence[Stream], texts: Sequence[str], ours: Sequence[str]
) -> LoadRun:
    """The figures of the streams; `texts` are theirs, `ours` those of our server under the same load."""
    ttft = distribution(stream.arrivals_ms[0] for stream in streams)
    itl = distribution(after - before for stream in streams for before, after in pairwise(stream.arrivals_ms))
    seconds = max(stream.arrivals_ms[-1] for stream in streams) / 1e3
    return LoadRun(
        server=server,
        prompts=load.prompts,
        streams=load.streams,
        round=round_,
        tokens_per_s=sum(stream.count for stream in streams) / seconds,
        ttft_p50_ms=ttft.p50,
        ttft_p95_ms=ttft.p95,
        ttft_p99_ms=ttft.p99,
        itl_p50_ms=itl.p50,
        itl_p95_ms=itl.p95,
        itl_p99_ms=itl.p99,
        alike=fmean(alike(mine, its) for mine, its in zip(ours, texts, strict=True)),
    )


def alike(ours: str, theirs: str) -> float:
    """The share of the longer text that both begin with."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    same = next((at for at, (mine, its) in pairs if mine != its), min(len(ours), len(theirs)))
    return same / max(len(ours), len(theirs), 1)


def summarize_loads(runs: Sequence[LoadRun], ours: str) -> list[LoadSummary]:
    """One summary for each load and server, in the order of the runs; only rounds with a run of ours count."""
    mine = {(run.prompts, run.streams, run.round): run for run in runs if run.server == ours}
    groups: dict[tuple[str, int, str], list[LoadRun]] = {}
    for run in runs:
        if (run.prompts, run.streams, run.round) in mine:
            groups.setdefault((run.prompts, run.streams, run.server), []).append(run)
    order = {key: number for number, key in enumerate(dict.fromkeys((run.prompts, run.streams) for run in runs))}
    ranked = sorted(groups.items(), key=lambda item: order[item[0][:2]])
    return [_summary(group, [mine[run.prompts, run.streams, run.round] for run in group]) for _, group in ranked]


def _summary(theirs: Sequence[LoadRun], ours: Sequence[LoadRun]) -> LoadSummary:
    def of(figure: Callable[[LoadRun], float]) -> float:
        return median(map(figure, theirs))

    def ratio(figure: Callable[[LoadRun], float]) -> float:
        return median(figure(mine) / figure(its) for mine, its in zip(ours, theirs, strict=True))

    return LoadSummary(
        server=theirs[0].server,
        prompts=theirs[0].prompts,
        streams=theirs[0].streams,
        tokens_per_s=of(lambda run: run.tokens_per_s),
        ttft_p50_ms=of(lambda run: run.ttft_p50_ms),
        ttft_p95_ms=of(lambda run: run.ttft_p95_ms),
        ttft_p99_ms=of(lambda run: run.ttft_p99_ms),
        itl_p50_ms=of(lambda run: run.itl_p50_ms),
        itl_p95_ms=of(lambda run: run.itl_p95_ms),
        itl_p99_ms=of(lambda run: run.itl_p99_ms),
        alike=of(lambda run: run.alike),
        tokens_ratio=ratio(lambda run: run.tokens_per_s),
        ttft_p95_ratio=ratio(lambda run: run.ttft_p95_ms),
        itl_p95_ratio=ratio(lambda run: run.itl_p95_ms),
    )


def title_of(prompts: str, streams: int) -> str:
    """A load in words."""
    return f"{streams} stream{'s' if streams > 1 else ''}, {TITLES[prompts]}"


def load_tables(summaries: Sequence[LoadSummary]) -> list[Table]:
    """The summaries for a person: a table for each load."""
    groups: dict[tuple[str, int], list[LoadSummary]] = {}
    for row in summaries:
        groups.setdefault((row.prompts, row.streams), []).append(row)
    return [_table(title_of(*load), rows) for load, rows in groups.items()]


def _table(title: str, rows: Sequence[LoadSummary]) -> Table:
    view = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    view.add_column("", no_wrap=True)
    headings = (
        "tok/s",
        "TTFT ms\np50/p95/p99",
        "ITL ms\np50/p95/p99",
        "tok/s\nratio",
        "TTFT p95\nratio",
        "ITL p95\nratio",
        "alike",
    )
    for heading in headings:
        view.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        view.add_row(
            row.server,
            f"{row.tokens_per_s:.0f}",
            f"{row.ttft_p50_ms:.0f}/{row.ttft_p95_ms:.0f}/{row.ttft_p99_ms:.0f}",
            f"{row.itl_p50_ms:.1f}/{row.itl_p95_ms:.0f}/{row.itl_p99_ms:.0f}",
            f"{row.tokens_ratio:.2f}x",
            f"{row.ttft_p95_ratio:.2f}x",
            f"{row.itl_p95_ratio:.2f}x",
            f"{row.alike:.0%}",
        )
    return view

"""Medians and ratios of a comparison, and the tables that a person reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from rich import box
from rich.table import Table

from starling.engine.divergence import Quality
from starling.profiling.peers.measure import Run


@dataclass(frozen=True, slots=True)
class Summary:
    """One contender on one prompt length: medians over the repeats, and our figures over its own, pair by pair.

    A ratio is the median over the repeats of our figure / this contender's, both of the same repeat and of the same
    precision: above 1 is our gain in decode, below 1 our gain in TTFT. `first_difference` has, for every repeat, the
    index of the first greedy token that differs from ours, None where all agree. `peak_rss_bytes` is the greatest.
    """

    contender: str
    precision: str
    prompt_tokens: int
    ttft_ms: float
    itl_p50_ms: float
    itl_p99_ms: float
    decode_tokens_per_s: float
    decode_ratio: float
    ttft_ratio: float
    first_difference: tuple[int | None, ...]
    peak_rss_bytes: int | None


def summarize(runs: Sequence[Run], groups: Mapping[str, Sequence[str]]) -> list[Summary]:
    """One Summary per precision, prompt length and contender; `groups` has each precision's contenders, ours first."""
    lengths = list(dict.fromkeys(run.prompt_tokens for run in runs))
    return [
        _summary(precision, _runs_of(runs, name, length), _runs_of(runs, names[0], length))
        for precision, names in groups.items()
        for length in lengths
        for name in names
    ]


def _runs_of(runs: Sequence[Run], contender: str, length: int) -> list[Run]:
    return sorted(
        (run for run in runs if (run.contender, run.prompt_tokens) == (contender, length)), key=lambda run: run.repeat
    )


def _summary(precision: str, group: Sequence[Run], ours: Sequence[Run]) -> Summary:
    pairs = list(zip(ours, group, strict=True))
    peaks = [run.peak_rss_bytes for run in group if run.peak_rss_bytes is not None]
    return Summary(
        contender=group[0].contender,
        precision=precision,
        prompt_tokens=group[0].prompt_tokens,
        ttft_ms=median(run.ttft_ms for run in group),
        itl_p50_ms=median(run.itl_p50_ms for run in group),
        itl_p99_ms=median(run.itl_p99_ms for run in group),
        decode_tokens_per_s=median(run.decode_tokens_per_s for run in group),
        decode_ratio=median(mine.decode_tokens_per_s / its.decode_tokens_per_s for mine, its in pairs),
        ttft_ratio=median(mine.ttft_ms / its.ttft_ms for mine, its in pairs),
        first_difference=tuple(first_difference(mine.tokens, its.tokens) for mine, its in pairs),
        peak_rss_bytes=max(peaks, default=None),
    )


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Index of the first token in which two lists of one length differ, None where they are equal."""
    return next((index for index, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)


def tables(summaries: Sequence[Summary], qualities: Mapping[str, Quality]) -> list[Table]:
    """The summaries for a person: a table for each precision and prompt length, narrow enough for 80 columns."""
    groups: dict[tuple[str, int], list[Summary]] = {}
    for row in summaries:
        groups.setdefault((row.precision, row.prompt_tokens), []).append(row)
    return [
        _table(f"{precision}, {length} prompt tokens", rows, qualities) for (precision, length), rows in groups.items()
    ]


def _table(title: str, rows: Sequence[Summary], qualities: Mapping[str, Quality]) -> Table:
    view = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    view.add_column("", no_wrap=True)
    headings = (
        "TTFT\nms",
        "ITL p50/p99\nms",
        "decode\ntok/s",
        "decode\nratio",
        "TTFT\nratio",
        "same\ntokens",
        "mean\nKL",
    )
    for heading in headings:
        view.add_column(heading, justify="right")
    for row in rows:
        view.add_row(
            row.contender,
            f"{row.ttft_ms:.1f}",
            f"{row.itl_p50_ms:.1f}/{row.itl_p99_ms:.0f}",
            f"{row.decode_tokens_per_s:.1f}",
            f"{row.decode_ratio:.2f}x",
            f"{row.ttft_ratio:.2f}x",
            _agreement(row.first_difference),
            mean_kl(qualities.get(row.contender)),
        )
    return view


def mean_kl(quality: Quality | None) -> str:
    """The mean KL in nats with two digits, empty where it was not measured."""
    return "" if quality is None or quality.divergence is None else f"{max(quality.divergence.mean_kl, 0.0):.2g}"


def _agreement(first_difference: Sequence[int | None]) -> str:
    """For example "5/5", or "3/5 @44" where two repeats left our greedy tokens, the first of them at token 44."""
    differing = [index for index in first_difference if index is not None]
    same = f"{len(first_difference) - len(differing)}/{len(first_difference)}"
    return f"{same} @{min(differing)}" if differing else same

"""Medians and ratios of a comparison, and the tables that a person reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from rich import box
from rich.table import Table

from starling.profiling.peers.measure import Run


@dataclass(frozen=True, slots=True)
class Summary:
    """One contender on one prompt length: medians over the repeats, and our figures over its own, pair by pair.

    A ratio is the median over the repeats of ours / this contender's, both of the same repeat: above 1 is our gain in
    decode, below 1 our gain in TTFT. `first_difference` has, for every repeat, the index of the first greedy token that
    differs from ours, None where all agree.
    """

    contender: str
    prompt_tokens: int
    ttft_ms: float
    itl_p50_ms: float
    itl_p99_ms: float
    decode_tokens_per_s: float
    decode_ratio: float
    ttft_ratio: float
    first_difference: tuple[int | None, ...]


def summarize(runs: Sequence[Run], ours: str) -> list[Summary]:
    """One Summary per prompt length and contender, in the order of the runs; `ours` names the one that is ours."""
    groups: dict[tuple[int, str], list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.repeat):
        groups.setdefault((run.prompt_tokens, run.contender), []).append(run)
    return [_summary(group, groups[length, ours]) for (length, _), group in groups.items()]


def _summary(group: Sequence[Run], ours: Sequence[Run]) -> Summary:
    pairs = list(zip(ours, group, strict=True))
    return Summary(
        contender=group[0].contender,
        prompt_tokens=group[0].prompt_tokens,
        ttft_ms=median(run.ttft_ms for run in group),
        itl_p50_ms=median(run.itl_p50_ms for run in group),
        itl_p99_ms=median(run.itl_p99_ms for run in group),
        decode_tokens_per_s=median(run.decode_tokens_per_s for run in group),
        decode_ratio=median(mine.decode_tokens_per_s / its.decode_tokens_per_s for mine, its in pairs),
        ttft_ratio=median(mine.ttft_ms / its.ttft_ms for mine, its in pairs),
        first_difference=tuple(first_difference(mine.tokens, its.tokens) for mine, its in pairs),
    )


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Index of the first token in which two lists of one length differ, None where they are equal."""
    return next((index for index, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)


def tables(summaries: Sequence[Summary]) -> list[Table]:
    """The summaries for a person: a table for each prompt length, narrow enough for 80 columns."""
    lengths = sorted({row.prompt_tokens for row in summaries})
    return [_table(length, [row for row in summaries if row.prompt_tokens == length]) for length in lengths]


def _table(length: int, rows: Sequence[Summary]) -> Table:
    view = Table(
        title=f"{length} prompt tokens", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False
    )
    view.add_column("", no_wrap=True)
    for heading in ("TTFT\nms", "ITL p50/p99\nms", "decode\ntok/s", "decode\nratio", "TTFT\nratio", "same\ntokens"):
        view.add_column(heading, justify="right")
    for row in rows:
        view.add_row(
            row.contender,
            f"{row.ttft_ms:.1f}",
            f"{row.itl_p50_ms:.2f}/{row.itl_p99_ms:.1f}",
            f"{row.decode_tokens_per_s:.1f}",
            f"{row.decode_ratio:.2f}x",
            f"{row.ttft_ratio:.2f}x",
            _agreement(row.first_difference),
        )
    return view


def _agreement(first_difference: Sequence[int | None]) -> str:
    """For example "5/5", or "3/5 @44" where two repeats left our greedy tokens, the first of them at token 44."""
    differing = [index for index in first_difference if index is not None]
    same = f"{len(first_difference) - len(differing)}/{len(first_difference)}"
    return f"{same} @{min(differing)}" if differing else same

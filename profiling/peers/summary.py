"""Medians and ratios of a comparison, and the table that a person reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

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


def table(summaries: Sequence[Summary], title: str) -> Table:
    """The summaries as a table, one row per prompt length and contender."""
    view = Table(title=title, caption="medians; ratios are ours / theirs, the median of pairs of the same repeat")
    for heading in ("prompt", "contender"):
        view.add_column(heading, overflow="fold")
    for heading in ("TTFT ms", "ITL p50 ms", "ITL p99 ms", "decode tok/s", "decode ratio", "TTFT ratio", "same tokens"):
        view.add_column(heading, justify="right")
    for row in sorted(summaries, key=lambda row: row.prompt_tokens):
        view.add_row(
            str(row.prompt_tokens),
            row.contender,
            f"{row.ttft_ms:.1f}",
            f"{row.itl_p50_ms:.2f}",
            f"{row.itl_p99_ms:.2f}",
            f"{row.decode_tokens_per_s:.1f}",
            f"{row.decode_ratio:.2f}x",
            f"{row.ttft_ratio:.2f}x",
            _agreement(row.first_difference),
        )
    return view


def _agreement(first_difference: Sequence[int | None]) -> str:
    """For example "5/5", or "3/5, first at 44" where two repeats left our greedy tokens, one at token 44."""
    differing = [index for index in first_difference if index is not None]
    same = f"{len(first_difference) - len(differing)}/{len(first_difference)}"
    return f"{same}, first at {min(differing)}" if differing else same

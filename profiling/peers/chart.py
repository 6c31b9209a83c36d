"""A comparison as one self-contained SVG: decode speed and TTFT as bars, for each precision and prompt length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from starling.profiling.peers.contenders import OURS

Document = Mapping[str, Any]

WIDTH, MARGIN = 900, 20
ROW, HEADING, GAP = 24, 54, 18
#: Left edges of the two panels of bars and their width, and the right edge of the figures after them.
DECODE_X, TTFT_X, BAR, KL_X = 190, 480, 200, WIDTH - MARGIN

STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: #1b2430; }
.page { fill: #ffffff; } .title { font-size: 17px; font-weight: 600; } .group { font-size: 14px; font-weight: 600; }
.quiet { fill: #5d6b7c; font-size: 12px; } text.us { font-weight: 600; }
.bar { fill: #b3bdc9; } .bar.us { fill: #2563c9; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6ebf1; } .page { fill: #11161d; } .quiet { fill: #93a1b1; }
  .bar { fill: #4a5665; } .bar.us { fill: #6ea3f7; }
}
"""


def comparison_chart(document: Document) -> str:
    """The chart of a comparison's JSON document, format version 2."""
    groups: dict[tuple[str, int], list[Document]] = {}
    for row in document["summaries"]:
        groups.setdefault((row["precision"], row["prompt_tokens"]), []).append(row)
    marks, y = _head(document)
    for (precision, length), rows in groups.items():
        marks += _group(f"{precision}, {length} prompt tokens", rows, document["quality"], y)
        y += HEADING + ROW * len(rows) + GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" role="img" '
        f'aria-label="Starling beside other runtimes"><style>{STYLE}</style>'
        f'<rect class="page" width="{WIDTH}" height="{y}"/>{"".join(marks)}</svg>\n'
    )


def _head(document: Document) -> tuple[list[str], int]:
    about, plan = document["environment"], document["plan"]
    name = document["bundles"][0]["source"]["name"]
    machine = f"{about['machine']['cpu']}, {plan['threads']} threads, batch 1, greedy, {plan['new_tokens']} new tokens"
    how = f"medians of {plan['rounds'] * plan['repeats']} interleaved repeats, {about['created'][:10]}"
    return [
        _text(MARGIN, 34, name, "title"),
        _text(MARGIN, 54, f"{machine}; {how}", "quiet"),
    ], 72


def _group(title: str, rows: Sequence[Document], quality: Document, top: int) -> list[str]:
    """The fastest decode first."""
    ordered = sorted(rows, key=lambda row: -float(row["decode_tokens_per_s"]))
    most, longest = (max(float(row[key]) for row in rows) for key in ("decode_tokens_per_s", "ttft_ms"))
    marks = [
        _text(MARGIN, top + 20, title, "group"),
        _text(DECODE_X, top + 42, "decode, tokens/s (more is better)", "quiet"),
        _text(TTFT_X, top + 42, "TTFT, ms (less is better)", "quiet"),
        _text(KL_X, top + 42, "mean KL, nats", "quiet", "end"),
    ]
    for index, row in enumerate(ordered):
        y, us = top + HEADING + ROW * index, row["contender"].split(" ")[0] == OURS
        marks += [
            _text(DECODE_X - 10, y + 15, row["contender"], "us" if us else "", "end"),
            *_bar(DECODE_X, y, row["decode_tokens_per_s"], most, us, lambda value: f"{value:.1f}"),
            *_bar(TTFT_X, y, row["ttft_ms"], longest, us, lambda value: f"{value:.0f}"),
            _text(KL_X, y + 15, _kl(quality.get(row["contender"])), "", "end"),
        ]
    return marks


def _bar(x: int, y: int, value: float, most: float, us: bool, shown: Callable[[float], str]) -> list[str]:
    width = value / most * BAR
    kind = "bar us" if us else "bar"
    return [
        f'<rect class="{kind}" x="{x}" y="{y + 2}" width="{width:.1f}" height="{ROW - 6}" rx="2"/>',
        _text(x + width + 6, y + 15, shown(value), "us" if us else ""),
    ]


def _kl(quality: Document | None) -> str:
    if quality is None or quality["divergence"] is None:
        return "-"
    return f"{max(float(quality['divergence']['mean_kl']), 0.0):.2g}"


def _text(x: float, y: float, content: str, kind: str = "", anchor: str = "start") -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<text{name} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'

"""A comparison as one self-contained SVG of bars: of decode speed and TTFT, for each precision and prompt length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from starling.profiling.peers.contenders import OURS

Document = Mapping[str, Any]

WIDTH, MARGIN = 900, 20
ROW, HEADING, GAP = 24, 54, 18
#: The right edge of what stands after the bars.
END_X = WIDTH - MARGIN

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


@dataclass(frozen=True, slots=True)
class Panel:
    """Bars of one figure from `x` on, `width` wide where it is greatest."""

    x: int
    width: int
    label: str
    key: str
    shown: str

    def marks(self, y: int, value: float, most: float, us: bool) -> list[str]:
        """The bar of a row and its figure."""
        length = value / most * self.width
        return [
            f'<rect class="{"bar us" if us else "bar"}" x="{self.x}" y="{y + 2}" width="{length:.1f}" '
            f'height="{ROW - 6}" rx="2"/>',
            _text(self.x + length + 6, y + 15, format(value, self.shown), "us" if us else ""),
        ]


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that are compared with each other. `notes` are words at the right end of each, under a heading."""

    title: str
    rows: Sequence[Document]
    heading: str = ""
    notes: Sequence[str] = ()


_COMPARISON = (
    Panel(190, 200, "decode, tokens/s (more is better)", "decode_tokens_per_s", ".1f"),
    Panel(480, 200, "TTFT, ms (less is better)", "ttft_ms", ".0f"),
)


def comparison_chart(document: Document) -> str:
    """The chart of a comparison's JSON document, format version 2."""
    about, plan = document["environment"], document["plan"]
    machine = f"{about['machine']['cpu']}, {plan['threads']} threads, batch 1, greedy, {plan['new_tokens']} new tokens"
    how = f"medians of {plan['rounds'] * plan['repeats']} interleaved repeats, {about['created'][:10]}"
    rows: dict[str, list[Document]] = {}
    for row in document["summaries"]:
        rows.setdefault(f"{row['precision']}, {row['prompt_tokens']} prompt tokens", []).append(row)
    groups = [
        Group(title, group, "mean KL, nats", [_kl(document["quality"].get(row["contender"])) for row in group])
        for title, group in rows.items()
    ]
    return bar_chart(document["bundles"][0]["source"]["name"], f"{machine}; {how}", groups, _COMPARISON, "contender")


def bar_chart(title: str, settings: str, groups: Sequence[Group], panels: Sequence[Panel], name: str) -> str:
    """The groups one below the other; `name` is the key of a row's own name. The first panel's greatest comes first."""
    marks, y = [_text(MARGIN, 34, title, "title"), _text(MARGIN, 54, settings, "quiet")], 72
    for group in groups:
        marks += _group(group, panels, name, y)
        y += HEADING + ROW * len(group.rows) + GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" role="img" '
        f'aria-label="Starling beside other runtimes"><style>{STYLE}</style>'
        f'<rect class="page" width="{WIDTH}" height="{y}"/>{"".join(marks)}</svg>\n'
    )


def _group(group: Group, panels: Sequence[Panel], name: str, top: int) -> list[str]:
    most = [max(float(row[panel.key]) for row in group.rows) for panel in panels]
    marks = [
        _text(MARGIN, top + 20, group.title, "group"),
        *(_text(panel.x, top + 42, panel.label, "quiet") for panel in panels),
        _text(END_X, top + 42, group.heading, "quiet", "end"),
    ]
    notes = group.notes or [""] * len(group.rows)
    ordered = sorted(zip(group.rows, notes, strict=True), key=lambda each: -float(each[0][panels[0].key]))
    for index, (row, note) in enumerate(ordered):
        y, us = top + HEADING + ROW * index, row[name].split(" ")[0] == OURS
        marks.append(_text(panels[0].x - 10, y + 15, row[name], "us" if us else "", "end"))
        for panel, greatest in zip(panels, most, strict=True):
            marks += panel.marks(y, row[panel.key], greatest, us)
        marks.append(_text(END_X, y + 15, note, "", "end"))
    return marks


def _kl(quality: Document | None) -> str:
    if quality is None or quality["divergence"] is None:
        return "-"
    return f"{max(float(quality['divergence']['mean_kl']), 0.0):.2g}"


def _text(x: float, y: float, content: str, kind: str = "", anchor: str = "start") -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<text{name} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'

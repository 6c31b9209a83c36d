"""A comparison as a person reads it at a terminal, rendered with rich."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from starling.profiling.compare import Comparison, Difference
from starling.profiling.figures import milliseconds

_STYLES = {"lower": "green", "higher": "red"}
_METHOD = (
    "B / A of the medians over the runs, 95 % bootstrap interval; a difference counts when the exact Mann-Whitney "
    "test says p < 0.05 and the interval leaves out 1. Variation between processes is not in it: repeat both."
)


def render_comparison(comparison: Comparison, before: str, after: str) -> RenderableType:
    """What else changed, a table for each point, and the figures without a known noise."""
    parts: list[RenderableType] = [Text(f"A {before}\nB {after}", "bold")]
    parts += [Text(f"{what}: {_short(a)} → {_short(b)}", "yellow") for what, a, b in comparison.changed]
    for point in dict.fromkeys((d.prompt_tokens, d.new_tokens, d.batch) for d in comparison.differences):
        rows = [d for d in comparison.differences if (d.prompt_tokens, d.new_tokens, d.batch) == point]
        parts += [Text(), _table("{} prompt tokens, {} new tokens, batch {}".format(*point), rows)]
    return Group(*parts, _singles(comparison), Text(), Text(_METHOD, "dim"))


def _table(title: str, rows: list[Difference]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for heading in ("A", "B", "B / A", "95 % interval", "p"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict")
    for row in rows:
        table.add_row(
            row.metric,
            milliseconds(row.before),
            milliseconds(row.after),
            f"{row.ratio:.3f}",
            f"{row.low:.3f} to {row.high:.3f}",
            f"{row.p:.3f}",
            Text(_verdict(row), _STYLES.get(row.verdict, "dim")),
        )
    return table


def _verdict(row: Difference) -> str:
    if row.verdict == "within noise":
        return "smaller than the noise"
    if row.verdict == "too few runs":
        return "too few runs to tell: --repeats 4 or more"
    return f"B is {row.verdict} by {abs(row.ratio - 1):.1%}"


def _singles(comparison: Comparison) -> Table:
    table = Table(title="measured once: noise unknown", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for heading in ("A", "B", "B / A"):
        table.add_column(heading, justify="right")
    for row in comparison.singles:
        ratio = f"{row.after / row.before:.3f}" if row.before else ""
        table.add_row(row.metric, milliseconds(row.before), milliseconds(row.after), ratio)
    return table


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "…"

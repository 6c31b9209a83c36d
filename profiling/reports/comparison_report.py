"""A comparison as a person reads it at a terminal, rendered with rich."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from starling.profiling.reports.comparison import LAST_ROW, Comparison, Difference
from starling.profiling.reports.legend import HOST, ITL, TPOT, TTFT
from starling.profiling.reports.legend import LAST_ROW as WHAT_LAST_ROW
from starling.profiling.reports.number_formats import gives, milliseconds
from starling.profiling.reports.tables import Facts, Figures

_STYLES = {"lower": "green", "higher": "red"}
_VERDICTS = {
    "lower": ("B lower", "the median of B is the lower one, by more than the noise"),
    "higher": ("B higher", "the median of B is the higher one, by more than the noise"),
    "within noise": ("noise", "the difference is smaller than the noise"),
    "too few runs": ("few runs", "too few runs to tell: --repeats 4 or more"),
}
_METHOD = (
    "Medians over the runs, B / A of them with its 95 % bootstrap interval; a difference counts when the exact "
    "Mann-Whitney test says p < 0.05 and the interval leaves out 1. Variation between processes is not in it: "
    "repeat both."
)
_SHOWN_AT_MOST = 60


def render_comparison(comparison: Comparison, before: str, after: str) -> RenderableType:
    """What else changed, a table for each point, the figures without a known noise, and the terms."""
    parts: list[RenderableType] = [Text(f"A {before}\nB {after}", "bold")]
    parts += [Text(f"warning: {warning}", "yellow") for warning in comparison.warnings]
    parts += [Text(_change(what, a, b), "yellow") for what, a, b in comparison.changed]
    shown = [row for row in comparison.differences if _has_enough_steps(row)]
    for point in dict.fromkeys((d.prompt_tokens, d.new_tokens, d.batch) for d in shown):
        rows = [d for d in shown if (d.prompt_tokens, d.new_tokens, d.batch) == point]
        parts += [Text(), _table("{} prompt tokens, {} new tokens, batch {}".format(*point), rows)]
    left_out = len(shown) < len(comparison.differences)
    parts += [Text(), _singles(comparison), Text(), Facts(_legend(shown, left_out), "dim"), Text(_METHOD, "dim")]
    return Group(*parts)


def _has_enough_steps(row: Difference) -> bool:
    """Whether the decode steps of one run give the percentile that the metric is."""
    return "p99" not in row.metric or gives(row.new_tokens - 1, "p99")


def _table(title: str, rows: list[Difference]) -> Figures:
    cells: list[list[str | Text]] = [
        [
            _name(row),
            milliseconds(row.before),
            milliseconds(row.after),
            f"{row.ratio:.3f}",
            Text(_VERDICTS[row.verdict][0], _STYLES.get(row.verdict, "dim")),
            f"{row.low:.3f} to {row.high:.3f}",
            f"{row.p:.3f}",
        ]
        for row in rows
    ]
    return Figures(["", "A", "B", "B / A", "verdict", "95 % interval", "p"], cells, title=title)


def _name(row: Difference) -> str:
    """The metric with the row that it is of: "TTFT ms", "TTFT, last row, ms"."""
    if row.of is None:
        return row.metric
    metric = row.metric.removesuffix(" ms").removeprefix("request ")
    return f"{metric}, {row.of}, ms"


def _singles(comparison: Comparison) -> Figures:
    rows = [
        [
            single.metric,
            milliseconds(single.before),
            milliseconds(single.after),
            f"{single.after / single.before:.3f}" if single.before else "",
        ]
        for single in comparison.singles
    ]
    return Figures(["", "A", "B", "B / A"], rows, title="measured once: noise unknown")


def _legend(rows: list[Difference], left_out: bool) -> dict[str, str]:
    terms = {"TTFT": TTFT, "ITL": ITL, "TPOT": TPOT, "host": HOST}
    if any(row.of == LAST_ROW for row in rows):
        terms["last row"] = WHAT_LAST_ROW
    verdicts = {row.verdict for row in rows}
    terms |= {term: meaning for verdict, (term, meaning) in _VERDICTS.items() if verdict in verdicts}
    terms["p"] = "how often chance alone makes two sets of runs as different"
    return {**terms, "ITL p99": "left out where a run has fewer than 100 decode steps"} if left_out else terms


def _change(what: str, before: str, after: str) -> str:
    """What else differs; digests and the like tell a reader nothing."""
    if max(len(before), len(after)) > _SHOWN_AT_MOST:
        return f"{what}: not the same (--json has both)"
    return f"{what}: {before} → {after}"

"""The charts of the HTML report, each an <svg> made from a profile's document."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np

from starling.profiling.operators.layer_parts import PARTS
from starling.profiling.reports.number_formats import gives, milliseconds, operations
from starling.profiling.reports.svg import Axis, Plot, end_with_room, rules_head

Document = Mapping[str, Any]

BINS = 48
#: Beyond this many times the p99, a step counts into the last bar: one stall would else flatten all the others.
CLIP = 1.25
_COLOURS = 5


def latency_distribution(measured: Document) -> str:
    """Histogram of the inter-token latencies of all runs, with those of p50, p95 and p99 that they give."""
    gaps = np.array([gap for run in measured["runs"] for gap in run[0]["itl_s"]]) * 1e3
    figures = measured["inter_token_latency_ms"]
    high = min(float(gaps.max()), figures["p99"] * CLIP)
    low = float(gaps.min())
    margin = (high - low) * 0.04 or low * 0.01
    counts, edges = np.histogram(np.minimum(gaps, high), BINS, (low - margin, high + margin))
    given = [name for name in ("p50", "p95", "p99") if gives(figures["count"], name)]
    rules = [(min(figures[name], high), f"{name} {milliseconds(figures[name])}") for name in given]
    longest = float(gaps.max())
    beyond = f"; the last bar: up to {milliseconds(longest)}" if longest > high else ""
    plot = Plot(
        Axis(
            float(edges[0]), end_with_room(float(edges[0]), float(edges[-1]), rules), f"inter-token latency, ms{beyond}"
        ),
        Axis(0, float(counts.max()) * 1.08, "steps"),
        head=rules_head(len(rules)),
    )
    for count, left, right in zip(counts, edges, edges[1:], strict=False):
        end = longest if left <= high < right else right
        plot.bar(float(left), float(right), float(count), "c1", f"{count} steps of {left:.2f} to {end:.2f} ms")
    plot.rules(rules)
    return plot.render("Histogram of inter-token latencies")


def latency_by_position(measured: Document) -> str:
    """Inter-token latency over an answer: the median run, and the band from the fastest to the slowest."""
    runs = np.array([run[0]["itl_s"] for run in measured["runs"]]) * 1e3
    first = measured["prompt_tokens"] + 1
    positions = [float(first + i) for i in range(runs.shape[1])]
    middle, low, high = (np.quantile(runs, share, axis=0) for share in (0.5, 0.0, 1.0))
    top = min(float(high.max()), float(np.quantile(runs, 0.99)) * CLIP) * 1.08
    longest = float(high.max())
    beyond = f"; cut, the longest: {milliseconds(longest)}" if longest > top else ""
    plot = Plot(
        Axis(positions[0], positions[-1] + 1e-9, "position in the sequence"),
        Axis(0, top, f"inter-token latency, ms{beyond}"),
    )
    upper = [(x, min(float(y), top)) for x, y in zip(positions, high, strict=True)]
    lower = [(x, min(float(y), top)) for x, y in zip(positions, low, strict=True)]
    plot.area([*upper, *reversed(lower)], "band")
    plot.line([(x, min(float(y), top)) for x, y in zip(positions, middle, strict=True)], "line c1")
    return plot.render("Inter-token latency over the position in the sequence")


def roofline(document: Document) -> str:
    """Every prefill and decode in operations per second over operations per byte, under the machine's roof."""
    peaks = document["machine_peaks"]
    peak, bandwidth = peaks["operations_per_second"], peaks["read_bytes_per_second"]
    phases = [
        (phase, measured, roof)
        for measured in document["measurements"]
        for phase in ("prefill", "decode")
        if (roof := measured[f"{phase}_roof"]) is not None
    ]
    intensities = [roof["operations"] / roof["bytes"] for _, _, roof in phases]
    reached = [roof["operations_per_second"] for _, _, roof in phases]
    ridge = peak / bandwidth
    x = Axis(min(*intensities, ridge) / 4, max(*intensities, ridge) * 4, "operations per byte", log=True)
    y = Axis(min(*reached, x.low * bandwidth) / 2e9, peak * 2.5 / 1e9, "GOP/s", log=True)
    plot = Plot(x, y)
    plot.line([(x.low, x.low * bandwidth / 1e9), (ridge, peak / 1e9), (x.high, peak / 1e9)], "line roof")
    plot.text(x.high, peak * 1.25 / 1e9, operations(peak), "end")
    plot.text(x.low * 1.1, x.low * bandwidth * 3.2 / 1e9, f"{bandwidth / 1e9:.1f} GB/s")
    for (phase, measured, roof), intensity in zip(phases, intensities, strict=True):
        where = f"{measured['prompt_tokens']}+{measured['new_tokens']}, batch {measured['batch']}"
        title = f"{phase} {where}: {operations(roof['operations_per_second'])}, {roof['share']:.0%} of the roof"
        label = f"{phase} {roof['share']:.0%}" if len(phases) <= 2 else ""
        place = roof["operations_per_second"] / 1e9
        plot.dot(intensity, place, "c1" if phase == "decode" else "c2", title, label, left=x.place(intensity) > 0.7)
    return plot.render("Roofline", lambda value: f"{value:,.0f}" if value >= 1 else f"{value:g}")


def sweep_chart(document: Document, key: str, label: str) -> str:
    """A latency's median over the prompt's length, a line for each batch."""
    points = document["measurements"]
    series: dict[int, list[tuple[float, float]]] = {}
    for measured in points:
        series.setdefault(measured["batch"], []).append((float(measured["prompt_tokens"]), measured[key]["p50"]))
    lengths = [measured["prompt_tokens"] for measured in points]
    ends = [(float(max(lengths)), f"batch {batch}") for batch in series]
    top = max(value for line in series.values() for _, value in line)
    low = min(lengths) * 0.8
    x = Axis(low, end_with_room(low, max(lengths) * 1.05, ends), "prompt tokens")
    plot = Plot(x, Axis(0, top * 1.15, label), height=260)
    for index, (batch, line) in enumerate(series.items()):
        colour = f"c{index % _COLOURS + 1}"
        line.sort()
        plot.line(line, f"line {colour}")
        for length, y in line:
            plot.dot(length, y, colour, f"batch {batch}, {length:.0f} tokens: {milliseconds(y)} ms")
    plot.names([(line[-1], f"batch {batch}") for batch, line in series.items()])
    return plot.render(f"{label} over the prompt's length")


def operator_bars(operators: Document) -> str:
    """Prefill and decode as one bar each, cut by the parts of the layer, with a legend."""
    parts = [part for part in PARTS if any(part in operators[phase]["parts_ms"] for phase in ("prefill", "decode"))]
    rows = []
    for phase in ("prefill", "decode"):
        times = operators[phase]
        rest = max(times["run_ms"] - times["operators_ms"], 0.0)
        pieces = [(part, times["parts_ms"].get(part, 0.0)) for part in parts] + [("executor and profiler", rest)]
        total = sum(ms for _, ms in pieces)
        cells = "".join(_piece(part, ms, total) for part, ms in pieces if ms > 0)
        rows.append(
            f'<div class="bar-row"><span>{phase}<small>{milliseconds(times["run_ms"])} ms</small></span>'
            f'<div class="stack">{cells}</div></div>'
        )
    names = [*parts, "executor and profiler"]
    legend = "".join(f'<li><i class="{part_class(name)}"></i>{escape(name)}</li>' for name in names)
    return f'{"".join(rows)}<ul class="legend">{legend}</ul>'


def part_class(part: str) -> str:
    """The CSS class of a part's colour."""
    return f"p{PARTS.index(part)}" if part in PARTS else "rest"


def _piece(part: str, ms: float, total: float) -> str:
    share = ms / total
    label = f"{share:.0%}" if share >= 0.06 else ""
    title = escape(f"{part}: {milliseconds(ms)} ms, {share:.1%}")
    return f'<div class="{part_class(part)}" style="width:{share * 100:.3f}%" title="{title}">{label}</div>'

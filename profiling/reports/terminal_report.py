"""A profile's document as a person reads it at a terminal, rendered with rich."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from starling.profiling.reports.legend import legend, operators_legend
from starling.profiling.reports.number_formats import (
    NOT_GIVEN,
    STATISTICS,
    bundle_line,
    drafts,
    latencies,
    load_warning,
    microseconds,
    milliseconds,
    operations,
    point_line,
    rate,
    rest_ms,
    run_line,
    size,
    statistics,
)
from starling.profiling.reports.tables import Facts, Figures

Document = Mapping[str, Any]


def render(document: Document) -> RenderableType:
    """Heading, sweep, each point's figures, what was measured once, the terms; then the operators with theirs."""
    points, operators = document["measurements"], document["operators"]
    parts: list[RenderableType] = [Text(bundle_line(document), "bold"), Text(run_line(document), "dim")]
    if (warning := load_warning(document["environment"])) is not None:
        parts.append(Text(f"warning: {warning}", "yellow"))
    if len(points) > 1:
        parts += [Text(), _sweep(points)]
    for measured in points:
        parts += [Text(), _latencies(measured), Facts(_point_facts(measured))]
    parts += [Text(), Facts(_facts(document)), Text(), Facts(legend(document), "dim")]
    if operators is not None:
        parts += [Text(), _operators(operators), Facts(operators_legend(operators), "dim")]
    return Group(*parts)


def _sweep(points: list[Document]) -> Figures:
    """A row for each point, with its medians."""
    batches = any(measured["batch"] > 1 for measured in points)
    roofs = any(measured["decode_roof"] is not None for measured in points)
    shown = [True] * 6 + [batches, roofs]
    headings = ["prompt", "new", "batch", "TTFT", "ITL", "tokens/s", "all rows", "roof"]
    rows = [[cell for cell, show in zip(_sweep_cells(measured), shown, strict=True) if show] for measured in points]
    title = "medians: TTFT and ITL in ms, decoded tokens/s" + (" of one row and of all" if batches else "")
    return Figures([name for name, show in zip(headings, shown, strict=True) if show], rows, names=3, title=title)


def _sweep_cells(measured: Document) -> list[str]:
    speed, roof = measured["output_tokens_per_second"], measured["decode_roof"]
    return [
        *(str(measured[name]) for name in ("prompt_tokens", "new_tokens", "batch")),
        *(milliseconds(measured[key]["p50"]) for key in ("time_to_first_token_ms", "inter_token_latency_ms")),
        f"{speed['per_row']:.1f}",
        f"{speed['total']:.1f}",
        "none" if roof is None else f"{roof['share']:.0%}",
    ]


def _latencies(measured: Document) -> Figures:
    rows = [
        [short, str(measured[key]["count"]), *statistics(measured[key], milliseconds)]
        for key, (_, short) in latencies(measured).items()
    ]
    host = measured["host_us_per_step"]
    rows.append(["host time, µs", str(host["count"]), *statistics(host, microseconds)])
    return Figures(["ms", "n", *STATISTICS], rows, title=point_line(measured))


def _point_facts(measured: Document) -> dict[str, str]:
    speed = measured["output_tokens_per_second"]
    spread = f"(runs {speed['slowest_run']:.1f} to {speed['fastest_run']:.1f})"
    if measured["batch"] > 1:
        decode = f"{speed['per_row']:.1f} tokens/s a row {spread}, all rows {speed['total']:.1f}"
    else:
        decode = f"{speed['per_row']:.1f} tokens/s {spread}"
    rows = {"decode": decode}
    if (drafted := drafts(measured)) is not None:
        rows["speculation"] = drafted
    for phase in ("prefill", "decode"):
        if (roof := measured[f"{phase}_roof"]) is not None:
            rows[f"{phase} roof"] = _roof(roof)
    if (gpu := measured["gpu"]) is not None:
        rows["GPU"] = _gpu(gpu)
    return rows


def _roof(roof: Document) -> str:
    reached = (
        f"{rate(roof['bytes_per_second'])} read"
        if roof["bound"] == "memory"
        else operations(roof["operations_per_second"])
    )
    return f"{roof['share']:.0%} of the {roof['bound']} limit reached ({reached})"


def _gpu(gpu: Document) -> str:
    energy = "" if gpu["energy_j_per_token"] is None else f", {gpu['energy_j_per_token']:.3g} J a token"
    return (
        f"{gpu['name']}: {size(gpu['memory_used_peak_bytes'])} used, {gpu['power_w']['mean']:.0f} W, "
        f"SM {gpu['sm_clock_mhz']['mean']:.0f} MHz{energy}"
    )


def _facts(document: Document) -> dict[str, str]:
    memory, cold, peaks = document["memory"], document["cold_start"], document["machine_peaks"]
    rows = {"load": f"{document['load_s']:.2f} s"}
    if cold is not None:
        rows["cold start"] = (
            f"{cold['total_s']:.2f} s from a fresh process to its first token: process {cold['process_s']:.2f}, "
            f"imports {cold['import_s']:.2f}, load {cold['load_s']:.2f}, first token {cold['first_token_s']:.2f}"
        )
    rows["memory"] = (
        f"weights {size(memory['weights_bytes'])}, KV cache {size(memory['kv_cache_bytes'])} "
        f"({memory['kv_cache_rows']} x {memory['kv_cache_positions']} positions), "
        f"peak RSS {size(memory['peak_rss_bytes'])}"
    )
    if peaks is None:
        rows["machine"] = "bandwidth and arithmetic are not measured on this provider"
    else:
        rows["machine"] = (
            f"reads {rate(peaks['read_bytes_per_second'])}; {operations(peaks['operations_per_second'])} "
            f"({peaks['operations_how']})"
        )
    return rows


def _operators(operators: Document) -> Figures:
    rows = f" of {operators['batch']} rows" if operators["batch"] > 1 else ""
    title = f"operators: prefill of {operators['prompt_tokens']} tokens, a decode step{rows}; ms of a run"
    phases = [operators["prefill"], operators["decode"]]
    cells = [
        [part, *_cells(phases, [phase["parts_ms"].get(part, 0.0) for phase in phases])]
        for part in dict.fromkeys(name for phase in phases for name in phase["parts_ms"])
    ]
    rests = [rest_ms(phase) for phase in phases]
    if any(rest is not None for rest in rests):
        cells.append(["executor and profiler", *_cells(phases, rests)])
    cells.append(["the run", *_cells(phases, [phase["run_ms"] for phase in phases])])
    return Figures(["part", "prefill", "%", "decode", "%"], cells, title=title)


def _cells(phases: list[Document], values: list[float | None]) -> list[str]:
    """Of each phase ms, and the share of the run."""
    return [
        text
        for phase, ms in zip(phases, values, strict=True)
        for text in ((NOT_GIVEN,) * 2 if ms is None else (milliseconds(ms), f"{ms / phase['run_ms']:.0%}"))
    ]

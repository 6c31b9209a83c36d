"""A profile's document as a person reads it at a terminal, rendered with rich."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from starling.profiling.figures import (
    LATENCIES,
    STATISTICS,
    bundle_line,
    drafts,
    milliseconds,
    operations,
    point_line,
    rate,
    run_line,
    size,
)

Document = Mapping[str, Any]


def render(document: Document) -> RenderableType:
    """Heading; for each point its latencies and figures; then what was measured once, and the operators."""
    parts: list[RenderableType] = [Text(bundle_line(document), "bold"), Text(run_line(document), "dim")]
    for measured in document["measurements"]:
        parts += [Text(), _latencies(measured), _point_figures(measured)]
    parts += [Text(), _figures(document)]
    if document["operators"] is not None:
        parts += [Text(), _operators(document["operators"])]
    return Group(*parts)


def _latencies(measured: Document) -> Table:
    table = Table(title=point_line(measured), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("ms", no_wrap=True)
    for name in STATISTICS:
        table.add_column(name, justify="right")
    for key, title in LATENCIES.items():
        table.add_row(title, *(milliseconds(measured[key][name]) for name in STATISTICS))
    return table


def _point_figures(measured: Document) -> Table:
    speed = measured["output_tokens_per_second"]
    together = f", {speed['total']:.1f} together" if measured["batch"] > 1 else ""
    rows = {
        "decode": f"{speed['per_row']:.1f} tokens/s a row{together} "
        f"({speed['slowest_run']:.1f} to {speed['fastest_run']:.1f} over the runs)",
        "host": f"{measured['host_us_per_step']['p50']:.0f} µs a step outside the model's run "
        f"(p99 {measured['host_us_per_step']['p99']:.0f})",
    }
    if (drafted := drafts(measured)) is not None:
        rows["speculation"] = drafted
    for phase in ("prefill", "decode"):
        if (roof := measured[f"{phase}_roof"]) is not None:
            rows[f"{phase} roof"] = _roof(roof)
    if (gpu := measured["gpu"]) is not None:
        rows["GPU"] = _gpu(gpu)
    return _grid(rows)


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


def _figures(document: Document) -> Table:
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
        rows["machine"] = f"reads {rate(peaks['read_bytes_per_second'])}; {operations(peaks['operations_per_second'])}"
        rows[""] = f"({peaks['operations_how']})"
    return _grid(rows)


def _operators(operators: Document) -> Table:
    title = (
        f"operators: prefill of {operators['prompt_tokens']} tokens, decode of {operators['batch']} row(s), ms a run"
    )
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("part")
    for phase in ("prefill", "decode"):
        for heading in (phase, "%"):
            table.add_column(heading, justify="right")
    phases = [operators["prefill"], operators["decode"]]
    for part in dict.fromkeys(name for phase in phases for name in phase["parts_ms"]):
        table.add_row(part, *_cells(phases, lambda phase, part=part: phase["parts_ms"].get(part, 0.0)))
    table.add_row("executor and profiler", *_cells(phases, lambda phase: phase["run_ms"] - phase["operators_ms"]))
    return table


def _cells(phases: list[Document], value: Any) -> list[str]:
    return [text for phase in phases for text in (f"{value(phase):.2f}", f"{value(phase) / phase['run_ms']:.0%}")]


def _grid(rows: Mapping[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    for name, text in rows.items():
        table.add_row(name, text)
    return table

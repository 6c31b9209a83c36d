"""A profile's document as one HTML page that needs nothing else: style and charts are inside, light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from starling.profiling.reports import charts
from starling.profiling.reports.legend import legend, operators_legend
from starling.profiling.reports.number_formats import (
    NOT_GIVEN,
    STATISTICS,
    bundle_line,
    drafts,
    gives,
    latencies,
    load_warning,
    microseconds,
    milliseconds,
    operations,
    point_line,
    precision,
    rate,
    run_line,
    size,
    statistics,
    tail,
)

Document = Mapping[str, Any]


def html_report(document: Document) -> str:
    """The page."""
    style = resources.files("starling.profiling.reports").joinpath("templates/report.css").read_text(encoding="utf-8")
    title = f"{document['bundle']['source'].get('name')} · {precision(document['bundle'])}"
    points = document["measurements"]
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="quiet">{escape(bundle_line(document))}<br>{escape(run_line(document))}</p>',
        _warning(document),
        _tiles(document),
        *([_sweep(points, document)] if len(points) > 1 else []),
        *(_point(measured) for measured in points),
        *([_roofline(document)] if document["machine_peaks"] is not None else []),
        *([_operators(document["operators"])] if document["operators"] is not None else []),
        _start_and_memory(document),
        _environment(document),
        f"<h2>Terms</h2>{_card(_list(legend(document).items()))}",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} · starling profile</title><style>\n{style}</style></head>\n"
        f"<body><main>\n{chr(10).join(body)}\n</main></body></html>\n"
    )


def _warning(document: Document) -> str:
    warning = load_warning(document["environment"])
    return "" if warning is None else f'<p class="warning">{escape(warning)}</p>'


def _tiles(document: Document) -> str:
    """The figures of the first point that are looked for first."""
    measured, memory = document["measurements"][0], document["memory"]
    speed, roof = measured["output_tokens_per_second"], measured["decode_roof"]
    ttft, itl = measured["time_to_first_token_ms"], measured["inter_token_latency_ms"]
    tiles = [
        ("TTFT, median", milliseconds(ttft["p50"]), "ms", tail(ttft)),
        ("ITL, median", milliseconds(itl["p50"]), "ms", tail(itl)),
        ("decode", f"{speed['total']:.1f}", "tok/s", f"runs {speed['slowest_run']:.1f} to {speed['fastest_run']:.1f}"),
        ("host time", f"{measured['host_us_per_step']['p50']:.0f}", "µs", "a step, outside the model's run"),
    ]
    if roof is not None:
        tiles.append(("decode roof", f"{roof['share']:.0%}", "", f"of the {roof['bound']} limit reached"))
    tiles.append(("peak RSS", size(memory["peak_rss_bytes"]), "", f"weights {size(memory['weights_bytes'])}"))
    cells = "".join(
        f'<div class="tile"><small>{escape(name)}</small><b>{escape(value)}<span>{unit}</span></b>'
        f"<small>{escape(more)}</small></div>"
        for name, value, unit, more in tiles
    )
    return f'<p class="quiet point">{escape(point_line(measured))}</p><div class="tiles">{cells}</div>'


def _sweep(points: Sequence[Document], document: Document) -> str:
    batches = any(point["batch"] > 1 for point in points)
    headings = [
        "prompt",
        "new",
        "batch",
        "TTFT p50",
        "ITL p50",
        "ITL p99",
        *(("tok/s a row", "tok/s all rows") if batches else ("tok/s",)),
        "decode roof",
    ]
    rows = [
        [
            str(point["prompt_tokens"]),
            str(point["new_tokens"]),
            str(point["batch"]),
            milliseconds(point["time_to_first_token_ms"]["p50"]),
            milliseconds(point["inter_token_latency_ms"]["p50"]),
            _p99(point["inter_token_latency_ms"]),
            f"{point['output_tokens_per_second']['per_row']:.1f}",
            *([f"{point['output_tokens_per_second']['total']:.1f}"] if batches else []),
            "none" if point["decode_roof"] is None else f"{point['decode_roof']['share']:.0%}",
        ]
        for point in points
    ]
    grid = ""
    if len({point["prompt_tokens"] for point in points}) > 1:
        grid = _grid(
            [
                ("TTFT, median", charts.sweep_chart(document, "time_to_first_token_ms", "TTFT, ms")),
                ("ITL, median", charts.sweep_chart(document, "inter_token_latency_ms", "ITL, ms")),
            ]
        )
    return f"<h2>Sweep</h2>{_card(_table(headings, rows))}{grid}"


def _p99(figures: Document) -> str:
    return milliseconds(figures["p99"]) if gives(figures["count"], "p99") else NOT_GIVEN


def _point(measured: Document) -> str:
    host = measured["host_us_per_step"]
    rows = [
        *(
            [name, str(measured[key]["count"]), *statistics(measured[key], milliseconds)]
            for key, (name, _) in latencies(measured).items()
        ),
        ["host time, µs", str(host["count"]), *statistics(host, microseconds)],
    ]
    grid = _grid(
        [
            ("Inter-token latency: how it is spread", charts.latency_distribution(measured)),
            (
                "Inter-token latency over the sequence: median run, and fastest to slowest",
                charts.latency_by_position(measured),
            ),
        ]
    )
    gpu = "" if measured["gpu"] is None else _card(_gpu(measured["gpu"]))
    drafted = drafts(measured)
    speculation = "" if drafted is None else f'<p class="quiet">speculation: {escape(drafted)}</p>'
    table = _card(_table(["ms", "n", *STATISTICS], rows))
    return f"<h2>{escape(point_line(measured))}</h2>{speculation}{table}{grid}{gpu}"


def _gpu(gpu: Document) -> str:
    headings = ["GPU", "memory used", "power W", "SM MHz", "memory MHz", "J a token"]
    energy = "none" if gpu["energy_j_per_token"] is None else f"{gpu['energy_j_per_token']:.3g}"
    means = [f"{gpu[name]['mean']:.0f}" for name in ("power_w", "sm_clock_mhz", "memory_clock_mhz")]
    return _table(headings, [[gpu["name"], size(gpu["memory_used_peak_bytes"]), *means, energy]])


def _roofline(document: Document) -> str:
    peaks = document["machine_peaks"]
    rows = []
    for measured in document["measurements"]:
        for phase, colour in (("prefill", "f"), ("decode", "d")):
            if (roof := measured[f"{phase}_roof"]) is None:
                continue
            rows.append(
                [
                    f'<i class="{colour}"></i>{phase} {measured["prompt_tokens"]}+{measured["new_tokens"]}'
                    f" x {measured['batch']}",
                    f"{roof['operations'] / 1e9:.2f}",
                    f"{roof['bytes'] / 1e6:.1f}",
                    operations(roof["operations_per_second"]),
                    rate(roof["bytes_per_second"]),
                    roof["bound"],
                    f"{roof['share']:.0%}",
                ]
            )
    headings = ["", "GOP", "MB", "reached", "moved", "bound by", "of the roof"]
    return (
        f'<h2>Roofline</h2><div class="grid"><div class="card">{charts.roofline(document)}</div>'
        f'<div class="card"><h3>The machine, as measured</h3>{_list(_peaks(peaks))}</div></div><p></p>'
        f"{_card(_table(headings, rows, escaped=True))}"
    )


def _peaks(peaks: Document) -> list[tuple[str, str]]:
    return [
        ("memory", f"{rate(peaks['read_bytes_per_second'])}: {peaks['read_how']}"),
        ("arithmetic", f"{operations(peaks['operations_per_second'])}: {peaks['operations_how']}"),
        *((name, operations(value)) for name, value in peaks["products"].items()),
        ("counting", "operations and bytes follow from the architecture; a multiply and an add are two operations"),
    ]


def _operators(operators: Document) -> str:
    rows = []
    for phase in ("prefill", "decode"):
        for row in sorted(operators[phase]["operators"], key=lambda row: -row["ms"]):
            share = row["ms"] / operators[phase]["run_ms"]
            rows.append(
                [
                    phase,
                    f'<i class="{charts.part_class(row["part"])}"></i>{escape(row["part"])}',
                    escape(row["operator"]),
                    f"{row['calls']:g}",
                    milliseconds(row["ms"]),
                    f"{row['ms'] * 1e3 / row['calls']:.0f}",
                    f"{share:.1%}",
                ]
            )
    headings = ["phase", "part", "operator", "calls", "ms", "µs a call", "share"]
    rows_text = f" of {operators['batch']} rows" if operators["batch"] > 1 else ""
    note = (
        f"{operators['profiler']}'s profiler: the median of {operators['prefill']['runs']} prefills of "
        f"{operators['prompt_tokens']} tokens and {operators['decode']['runs']} decode steps{rows_text}. "
        "It slows small operators: read the shares."
    )
    terms = "".join(f"<br>{escape(f'{name}: {text}.')}" for name, text in operators_legend(operators).items())
    return (
        f"<h2>Where the time goes</h2>{_card(charts.operator_bars(operators))}"
        f'<p class="quiet"><small>{escape(note)}{terms}</small></p>'
        f"<details><summary>All operators</summary>{_card(_table(headings, rows, escaped=True))}</details>"
    )


def _start_and_memory(document: Document) -> str:
    memory, cold = document["memory"], document["cold_start"]
    entries = [("load", f"{document['load_s']:.2f} s")]
    if cold is not None:
        entries.append(
            (
                "cold start",
                f"{cold['total_s']:.2f} s from a fresh process to its first token: process {cold['process_s']:.2f}, "
                f"imports {cold['import_s']:.2f}, load {cold['load_s']:.2f}, first token {cold['first_token_s']:.2f}",
            )
        )
    cache = f"{memory['kv_cache_rows']} x {memory['kv_cache_positions']} positions"
    entries += [
        ("weights", size(memory["weights_bytes"])),
        ("KV cache", f"{size(memory['kv_cache_bytes'])} for {cache}"),
        ("peak RSS", size(memory["peak_rss_bytes"])),
    ]
    return f"<h2>Start and memory</h2>{_card(_list(entries))}"


def _environment(document: Document) -> str:
    environment, run = document["environment"], document["run"]
    machine, load = environment["machine"], environment["load_average"]
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    entries = [
        ("measured", environment["created"]),
        ("processor", f"{machine['cpu']}, {machine['physical_cores']} cores, {', '.join(machine['isa'])}"),
        ("memory", size(machine["memory_bytes"])),
        ("load average", "none" if load is None else ", ".join(f"{value:.2f}" for value in load)),
        ("backend", f"{run['backend']}, {run['provider']}, {run['threads']} threads"),
        ("packages", packages),
        ("system", f"Python {environment['python']}, {environment['system']}"),
        ("bundle", f"{document['bundle']['folder']}, {document['bundle']['dialect']} dialect"),
    ]
    return f"<h2>Environment</h2>{_card(_list(entries))}"


def _card(content: str) -> str:
    return f'<div class="card">{content}</div>'


def _grid(cells: Iterable[tuple[str, str]]) -> str:
    inside = "".join(f'<div class="card"><h3>{escape(title)}</h3>{content}</div>' for title, content in cells)
    return f'<div class="grid">{inside}</div>'


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, escaped: bool = False) -> str:
    """A table; `escaped` says that the cells are HTML already."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    lines = (
        "<tr>" + "".join(f"<td>{cell if escaped else escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _list(entries: Iterable[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in entries) + "</dl>"

"""The tables of docs/measurements.md, "On a GPU", from the file of measurements."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Line = dict[str, Any]
_PROMPTS, _ROWS = (128, 2048), (1, 4, 16)
_PRECISIONS = ("int8", "fp16")
_PRODUCTS = ("qkv", "o", "gate_up", "down", "lm_head")


def all_tables(document: dict[str, Any]) -> str:
    """All of them, in the order of the page."""
    runs = document["runs"]
    tables = (decode_table(runs), first_token_table(runs), history_table(runs), step_table(runs), product_table(runs))
    return "\n\n".join(table for table in tables if table)


def decode_table(runs: Sequence[dict[str, Any]]) -> str:
    """Tokens a second of the newest run, and of PyTorch in the newest run that has it."""
    rows = []
    for precision in _PRECISIONS:
        lines = _steps(_newest(runs, precision), precision)
        for label in dict.fromkeys(line["label"] for line in lines):
            rows += [_decode_row(f"{precision}, {label}", lines, label, count) for count in _ROWS]
    for how in ("compiled, CUDA graph", "static cache, CUDA graph"):
        peers = [line for line in _newest(runs, "peers") if line.get("how") == how and "tok_s" in line]
        for count in _ROWS:
            rows.append([f"fp16, transformers: {how}", str(count), *_figures(peers, count, "tok_s"), ""])
    header = ["tokens/s", "rows", "128 positions", "2,048 positions", "of the bandwidth"]
    return _table(header, [row for row in rows if row[2] != "-"])


def _decode_row(name: str, lines: Iterable[Line], label: str, rows: int) -> list[str]:
    of_label = [line for line in lines if line["label"] == label]
    shares = [f"{line['share']:.0%}" for line in of_label if line["rows"] == rows and line["prompt"] == _PROMPTS[0]]
    return [name, str(rows), *_figures(of_label, rows, "tok_s"), shares[0] if shares else "-"]


def first_token_table(runs: Sequence[dict[str, Any]]) -> str:
    """Milliseconds to the first token at batch 1."""
    rows = []
    for precision in _PRECISIONS:
        lines = [line for line in _steps(_newest(runs, precision), precision) if line.get("ttft_ms")]
        for label in dict.fromkeys(line["label"] for line in lines):
            of_label = [line for line in lines if line["label"] == label]
            rows.append([f"{precision}, {label}", *_figures(of_label, 1, "ttft_ms")])
    eager = [{"rows": 1, **line} for line in _newest(runs, "peers") if line.get("how") == "eager" and "ttft_ms" in line]
    rows.append(["fp16, transformers: eager", *_figures(eager, 1, "ttft_ms")])
    return _table(["time to the first token, ms", "128 tokens", "2,048 tokens"], rows)


def history_table(runs: Sequence[dict[str, Any]]) -> str:
    """Tokens a second at 128 positions with what was the default, run by run."""
    rows = []
    for precision in _PRECISIONS:
        for count in _ROWS:
            cells = []
            for run in runs:
                lines = _steps(run["measurements"], precision)
                default = [line for line in lines if line["label"] == run["defaults"].get(precision)]
                cells.append(_figures(default, count, "tok_s")[0])
            rows.append([precision, str(count), *cells])
    header = ["tokens/s, 128 positions", "rows", *(f"{run['label']} ({run['commit']})" for run in runs)]
    return _table(header, rows)


def step_table(runs: Sequence[dict[str, Any]]) -> str:
    """Whole decode steps of our kernels alone, from the newest run that tuned them."""
    steps = [line for line in _newest(runs, "kernels") if line.get("event") == "step" and line["early"]]
    rows = [
        [
            "int8" if line["bits"] == 8 else "fp16",
            str(line["m"]),
            f"{line['length']:,}",
            f"{line['ms']:.2f}",
            _count(line["tokens_s"]),
            f"{line['share']:.0%}",
        ]
        for line in sorted(steps, key=lambda line: (line["bits"], line["m"], line["length"]))
    ]
    return _table(["our kernels alone", "rows", "positions", "ms a step", "tokens/s", "of the bandwidth"], rows)


def product_table(runs: Sequence[dict[str, Any]]) -> str:
    """Microseconds and share of the bandwidth of each product's best variant, and of PyTorch's."""
    lines = _newest(runs, "kernels")
    rows = []
    for product in _PRODUCTS:
        for count in _ROWS:
            of_product = [line for line in lines if line.get("product") == product and line["m"] == count]
            best = {line["bits"]: line for line in of_product if line["event"] == "best"}
            peer = [line for line in of_product if line["event"] == "torch"]
            cells = [f"{best[bits]['us']:.1f} ({best[bits]['share']:.0%})" if bits in best else "-" for bits in (8, 16)]
            cells.append(f"{peer[0]['torch_us']:.1f} ({peer[0]['share']:.0%})" if peer else "-")
            rows.append([product, str(count), *cells])
    header = ["µs (of the bandwidth)", "rows", "int8", "fp16", "fp16, PyTorch"]
    return _table(header, [row for row in rows if set(row[2:]) != {"-"}])


def _newest(runs: Sequence[dict[str, Any]], stage: str) -> list[Line]:
    """The lines of a stage in the newest run that has some."""
    for run in reversed(runs):
        lines = [line for line in run["measurements"] if line["stage"] == stage and "failed" not in line]
        if lines:
            return lines
    return []


def _steps(lines: Iterable[Line], precision: str) -> list[Line]:
    return [line for line in lines if line["stage"] == precision and line.get("how") == "starling"]


def _figures(lines: Iterable[Line], rows: int, name: str) -> list[str]:
    """The value at both prompt lengths."""
    values = {line["prompt"]: line[name] for line in lines if line["rows"] == rows and line.get(name) is not None}
    return [_count(values[prompt]) if prompt in values else "-" for prompt in _PROMPTS]


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

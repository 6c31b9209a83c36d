"""How the figures of a profile are written, at a terminal and in the HTML report alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

#: The latencies of a document, their standard names, and the short ones of a narrow table.
LATENCIES = {
    "time_to_first_token_ms": ("time to first token (TTFT)", "TTFT"),
    "time_to_first_token_last_row_ms": ("TTFT, last row", "TTFT, last row"),
    "inter_token_latency_ms": ("inter-token latency (ITL)", "ITL"),
    "time_per_output_token_ms": ("time per output token (TPOT)", "TPOT"),
    "request_latency_ms": ("request latency", "request latency"),
    "request_latency_last_row_ms": ("latency, last row", "latency, last row"),
}
STATISTICS = ("min", "mean", "p50", "p90", "p95", "p99", "max")
#: How many values a percentile takes: as many as put at least one of them above it. min, mean, p50 and max take any.
LEAST_VALUES = {"p90": 10, "p95": 20, "p99": 100}
#: Stands for a percentile that the values are too few for.
NOT_GIVEN = "-"


def latencies(measured: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The latencies that say something of this point: one row alone is the last one too."""
    batch = measured["batch"] > 1
    # Documents of before there was a last row's have none.
    return {key: names for key, names in LATENCIES.items() if key in measured and (batch or "last_row" not in key)}


def gives(count: int, statistic: str) -> bool:
    """Whether so many values give this statistic."""
    return count >= LEAST_VALUES.get(statistic, 1)


def statistics(figures: Mapping[str, Any], write: Callable[[float], str]) -> list[str]:
    """A distribution's figures in the order of STATISTICS, a dash for those that it has too few values for."""
    return [write(figures[name]) if gives(figures["count"], name) else NOT_GIVEN for name in STATISTICS]


def tail(figures: Mapping[str, Any]) -> str:
    """The slow end of a distribution of ms: its p99, else its max."""
    name = "p99" if gives(figures["count"], "p99") else "max"
    return f"{name} {milliseconds(figures[name])} ms"


def microseconds(value: float) -> str:
    """In µs, without decimals."""
    return f"{value:,.0f}"


def milliseconds(value: float) -> str:
    """In ms, with as many digits as mean something."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def size(count: float) -> str:
    """Bytes in MB or GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def rate(bytes_per_second: float) -> str:
    """Bytes per second in GB/s."""
    return f"{bytes_per_second / 1e9:.1f} GB/s"


def operations(per_second: float) -> str:
    """Operations per second in GOP/s or TOP/s; a multiply and an add are two."""
    return f"{per_second / 1e12:.2f} TOP/s" if per_second >= 1e12 else f"{per_second / 1e9:.1f} GOP/s"


def precision(bundle: Mapping[str, Any]) -> str:
    """dtype, or the quantization's scheme with its block."""
    how = bundle["quantization"]
    if how is None:
        return str(bundle["dtype"])
    block = how.get("block_size")
    return f"{how['scheme']} ({f'block {block}' if block else 'per channel'})"


def bundle_line(document: Mapping[str, Any]) -> str:
    """What was measured: model, precision, provider, threads."""
    bundle, run = document["bundle"], document["run"]
    # Documents of before there were kernels have no such field.
    kernels = f" with {run['kernels']} kernels" if run.get("kernels") else ""
    provider = f"{run['provider']}{kernels}"
    return f"{bundle['source'].get('name')} · {precision(bundle)} · {provider} · {run['threads']} threads"


def run_line(document: Mapping[str, Any]) -> str:
    """Where and when."""
    environment, run = document["environment"], document["run"]
    load = environment["load_average"]
    load_text = "" if load is None else f" · load average {load[0]:.1f}"
    return (
        f"{run['repeats']} runs after {run['warmup']} of warm-up · {environment['machine']['cpu']} · "
        f"{environment['created']}{load_text}"
    )


def load_warning(environment: Mapping[str, Any]) -> str | None:
    """That the machine had other work when the measurement began; None where it had none to speak of."""
    load, cores = environment["load_average"], environment["machine"]["physical_cores"]
    if load is None or load[0] <= cores:
        return None
    return (
        f"the load average was {load[0]:.2f} before the measurement, on {cores} core{'s' if cores > 1 else ''}: "
        "other work takes time from it; measure again when the machine is idle"
    )


def drafts(measured: Mapping[str, Any]) -> str | None:
    """What speculation brought at one point; None where no draft was made."""
    figures = measured.get("speculation")  # profiles written before there was any have no such field
    if figures is None:
        return None
    return (
        f"{figures['accepted_tokens']} of {figures['drafted_tokens']} drafted tokens accepted "
        f"({figures['acceptance']:.0%}), {figures['tokens_per_run']:.2f} tokens a run of the model"
    )


def point_line(measured: Mapping[str, Any]) -> str:
    """One point of the sweep."""
    return f"{measured['prompt_tokens']} prompt tokens, {measured['new_tokens']} new tokens, batch {measured['batch']}"


def rest_ms(phase: Mapping[str, Any]) -> float | None:
    """What a phase's run takes beyond its operators; None where these overlap and take longer than the run."""
    rest: float = phase["run_ms"] - phase["operators_ms"]
    return None if rest < -1e-6 * phase["run_ms"] else max(rest, 0.0)

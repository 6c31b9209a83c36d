"""How the figures of a profile are written, at a terminal and in the HTML report alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: The latencies of a document and their standard names.
LATENCIES = {
    "time_to_first_token_ms": "time to first token (TTFT)",
    "inter_token_latency_ms": "inter-token latency (ITL)",
    "time_per_output_token_ms": "time per output token (TPOT)",
    "request_latency_ms": "request latency",
}
STATISTICS = ("min", "mean", "p50", "p90", "p95", "p99", "max")


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
    return f"{bundle['source'].get('name')} · {precision(bundle)} · {run['provider']} · {run['threads']} threads"


def run_line(document: Mapping[str, Any]) -> str:
    """Where and when."""
    environment, run = document["environment"], document["run"]
    load = environment["load_average"]
    load_text = "" if load is None else f" · load average {load[0]:.1f}"
    return (
        f"{run['repeats']} runs behind {run['warmup']} of warm-up · {environment['machine']['cpu']} · "
        f"{environment['created']}{load_text}"
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

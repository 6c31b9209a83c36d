"""A profile as a person reads it, rendered with rich."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from starling.engine.bundle import Bundle
from starling.profiling.profile import NOT_MEASURED, Profile
from starling.profiling.statistics import Distribution


def render(profile: Profile, bundle: Bundle) -> RenderableType:
    """Heading, latencies, then the single figures."""
    return Group(_heading(profile, bundle), _latencies(profile), _figures(profile, bundle))


def _heading(profile: Profile, bundle: Bundle) -> Text:
    settings, how = profile.settings, bundle.quantization
    precision = bundle.dtype if how is None else f"{how.scheme} (block {how.block_size})"
    text = Text(f"{bundle.source.get('name')} · {precision} · {profile.provider} · {profile.threads} threads\n", "bold")
    text.append(
        f"{settings.prompt_tokens} prompt tokens, {settings.new_tokens} new tokens, batch {settings.batch}, "
        f"{settings.repeats} repeats · {profile.machine.cpu}",
        "not bold",
    )
    return text


def _latencies(profile: Profile) -> Table:
    table = Table("ms", *("min", "avg", "p50", "p90", "p95", "p99", "max"))
    for column in table.columns[1:]:
        column.justify = "right"
    rows = {
        "time to first token (TTFT)": profile.ttft_ms,
        "inter-token latency (ITL)": profile.itl_ms,
        "time per output token (TPOT)": profile.tpot_ms,
        "request latency": profile.request_latency_ms,
    }
    for name, values in rows.items():
        table.add_row(name, *_cells(values))
    return table


def _cells(values: Distribution) -> list[str]:
    columns = (values.min, values.avg, values.p50, values.p90, values.p95, values.p99, values.max)
    return [f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" for value in columns]


def _figures(profile: Profile, bundle: Bundle) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row("load", f"{profile.load_s:.2f} s")
    table.add_row("decode", _decode(profile))
    table.add_row("host time", f"{profile.host_us_per_step:.0f} µs a step outside the model's run")
    table.add_row("peak RSS", f"{profile.peak_rss_bytes / 1e6:,.0f} MB")
    table.add_row(
        "KV cache",
        f"{profile.kv_cache_bytes / 1e6:,.1f} MB for {profile.settings.batch} x {profile.max_seq} positions "
        f"({bundle.kv_cache.bytes_per_token:,} bytes a token)",
    )
    table.add_row("bandwidth", _bandwidth(profile))
    return table


def _decode(profile: Profile) -> str:
    spread = f"{profile.slowest_tokens_per_second:.1f} to {profile.fastest_tokens_per_second:.1f} over the repeats"
    if profile.settings.batch == 1:
        return f"{profile.decode_tokens_per_second:.1f} tokens/s ({spread})"
    return (
        f"{profile.decode_tokens_per_second:.1f} tokens/s a row ({spread}), "
        f"{profile.total_tokens_per_second:.1f} tokens/s together"
    )


def _bandwidth(profile: Profile) -> str:
    reached = profile.bandwidth
    if reached is None:
        return NOT_MEASURED
    return (
        f"{reached.reached / 1e9:.1f} GB/s of the machine's {reached.machine / 1e9:.1f} GB/s ({reached.share:.0%}): "
        f"{reached.weight_bytes_per_step / 1e6:,.1f} MB of weights and "
        f"{reached.live_kv_bytes_per_step / 1e6:,.1f} MB of live KV cache a step"
    )

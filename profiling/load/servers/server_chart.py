"""The chart of a measurement of servers: throughput, TTFT and ITL as bars, for each load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starling.profiling.load.servers.server_summary import title_of
from starling.profiling.peers.chart import Group, Panel, bar_chart

_PANELS = (
    Panel(190, 150, "tokens/s (more is better)", "tokens_per_s", ".0f"),
    Panel(425, 150, "TTFT p95, ms (less is better)", "ttft_p95_ms", ".0f"),
    Panel(660, 150, "ITL p95, ms (less is better)", "itl_p95_ms", ".1f"),
)


def load_chart(document: Mapping[str, Any]) -> str:
    """The chart of the JSON document of `starling.profiling.load.peer_servers`."""
    about, plan = document["calls"][-1]["environment"], document["plan"]
    rounds = 1 + max(run["round"] for run in document["runs"])
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in document["summaries"]:
        groups.setdefault(title_of(row["prompts"], row["streams"]), []).append(row)
    settings = (
        f"{about['machine']['cpu']}, {plan['threads']} threads, greedy, {plan['new_tokens']} new tokens; medians of "
        f"{rounds} interleaved rounds, {about['created'][:10]}"
    )
    name = f"{document['bundle']['source']['name']}: servers under load"
    return bar_chart(name, settings, [Group(title, rows) for title, rows in groups.items()], _PANELS, "server")

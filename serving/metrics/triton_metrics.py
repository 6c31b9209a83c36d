"""Triton's custom metrics, with the table of starling.serving.metrics.metric_table: one thread makes all calls.

Triton 2.51 crashes as a whole when two threads call them at the same time.
"""

from __future__ import annotations

from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from starling.engine.batching.serving_stats import ServingStats
from starling.engine.generation.results import Timings
from starling.serving.metrics import metric_table as table

#: Seconds between two looks at the serving loop's state.
REFRESH_S = 0.25
_REASONS = ("stop", "length", "abort")


class TritonMetrics:
    """The metrics of one engine."""

    def __init__(self, pb_utils: Any, model_name: str, stats: Any) -> None:
        """`pb_utils`: triton_python_backend_utils. `stats`: gives the ServingStats of now.

        Raises pb_utils.TritonModelException where the server was started without metrics.
        """
        self._labels = {"model_name": model_name, "engine": "0"}
        self._stats = stats
        self._families: list[Any] = []
        self._counted: dict[Any, float] = {}
        self._state = {
            metric: self._make(pb_utils, metric, self._labels)
            for metric in table.STATE_METRICS
            if metric is not table.REQUEST_SUCCESS
        }
        family = self._family(pb_utils, table.REQUEST_SUCCESS)
        self._ends = {reason: family.Metric(labels={**self._labels, table.REASON_LABEL: reason}) for reason in _REASONS}
        self._request = {metric: self._make(pb_utils, metric, self._labels) for metric in table.REQUEST_METRICS}
        self._finished: SimpleQueue[Timings | None] = SimpleQueue()
        self._thread = Thread(target=self._work, name="starling-metrics", daemon=True)
        self._thread.start()

    def ended(self, timings: Timings) -> None:
        """A request has ended; any thread may say so."""
        self._finished.put(timings)

    def close(self) -> None:
        """End the thread when it has reported what it knows."""
        self._finished.put(None)
        self._thread.join(timeout=5)

    def _work(self) -> None:
        while True:
            try:
                timings = self._finished.get(timeout=REFRESH_S)
            except Empty:
                self._refresh(self._stats())
                continue
            if timings is None:
                self._refresh(self._stats())
                return
            for metric, value in table.observations(timings):
                self._request[metric].observe(value)

    def _refresh(self, stats: ServingStats) -> None:
        self._state[table.RUNNING].set(stats.running)
        self._state[table.WAITING].set(stats.waiting)
        self._state[table.CACHE_USAGE].set(stats.running / stats.max_batch)
        self._raise(self._state[table.PROMPT_TOKENS], stats.prompt_tokens)
        self._raise(self._state[table.GENERATION_TOKENS], stats.generated_tokens)
        self._raise(self._state[table.PREFIX_QUERIES], stats.prefix_queries)
        self._raise(self._state[table.PREFIX_HITS], stats.prefix_hits)
        self._raise(self._state[table.DRAFTS], stats.drafts)
        self._raise(self._state[table.DRAFT_TOKENS], stats.drafted_tokens)
        self._raise(self._state[table.ACCEPTED_TOKENS], stats.accepted_tokens)
        ends = dict.fromkeys(_REASONS, 0)
        for reason, count in stats.ended.items():
            ends[table.finished_reason(reason)] += count
        for name, count in ends.items():
            self._raise(self._ends[name], count)

    def _raise(self, counter: Any, total: float) -> None:
        added = total - self._counted.get(counter, 0)
        if added > 0:
            counter.increment(added)
            self._counted[counter] = total

    def _make(self, pb_utils: Any, metric: table.Metric, labels: dict[str, str]) -> Any:
        family = self._family(pb_utils, metric)
        if metric.kind == "histogram":
            return family.Metric(labels=labels, buckets=list(metric.buckets))
        return family.Metric(labels=labels)

    def _family(self, pb_utils: Any, metric: table.Metric) -> Any:
        name = f"{metric.name}_total" if metric.kind == "counter" else metric.name
        kind = getattr(pb_utils.MetricFamily, metric.kind.upper())
        family = pb_utils.MetricFamily(name=name, description=metric.help, kind=kind)
        self._families.append(family)  # Triton forgets a family that nobody holds
        return family

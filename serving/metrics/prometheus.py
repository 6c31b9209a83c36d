"""The metrics of a service in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from starling.engine.batching.serving_stats import ServingStats
from starling.engine.generation.results import Timings
from starling.engine.pooling_loop import PoolingTimings
from starling.serving.metrics.metric_table import (
    ACCEPTED_TOKENS,
    CACHE_USAGE,
    DRAFT_TOKENS,
    DRAFTS,
    GENERATION_TOKENS,
    LABELS,
    PREFIX_HITS,
    PREFIX_QUERIES,
    PROMPT_TOKENS,
    REQUEST_METRICS,
    REQUEST_SUCCESS,
    RUNNING,
    WAITING,
    Metric,
    finished_reason,
    observations,
    pooling_observations,
)

CONTENT_TYPE = CONTENT_TYPE_LATEST
ENGINE = "0"
_PROCESS = ProcessCollector(registry=None)


class PrometheusMetrics:
    """A model's histograms of finished requests, and its loop's state when the metrics are read. Thread-safe."""

    def __init__(self, model: str, stats: Callable[[], ServingStats]) -> None:
        self._labels = (model, ENGINE)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_State(self._labels, stats))
        self._histograms = {metric.name: self._histogram(metric) for metric in REQUEST_METRICS}

    def record(self, timings: Timings | PoolingTimings) -> None:
        """Take a request that has ended into account."""
        found = pooling_observations(timings) if isinstance(timings, PoolingTimings) else observations(timings)
        for metric, value in found:
            self._histograms[metric.name].observe(value)

    def collect(self) -> Iterable[Family]:
        """The families of now, with this model's samples."""
        return self._registry.collect()

    def export(self) -> bytes:
        """All metrics, as /metrics gives them for this model alone."""
        return export_metrics([self])

    def _histogram(self, metric: Metric) -> Histogram:
        family = Histogram(metric.name, metric.help, LABELS, buckets=metric.buckets, registry=self._registry)
        return family.labels(*self._labels)


def export_metrics(models: Sequence[PrometheusMetrics]) -> bytes:
    """The metrics of several models and of the process, each family once, as /metrics gives them."""
    return generate_latest(_Together(models))


class _Together(CollectorRegistry):
    """The families of several models, each with the samples of all."""

    def __init__(self, models: Sequence[PrometheusMetrics]) -> None:
        super().__init__(auto_describe=False)
        self._models = models

    def collect(self) -> Iterator[Family]:
        """Families of the process, then those of the models."""
        yield from _PROCESS.collect()
        found: dict[str, Family] = {}
        for family in (family for model in self._models for family in model.collect()):
            if (known := found.setdefault(family.name, family)) is not family:
                known.samples.extend(family.samples)
        yield from found.values()


class _State(Collector):
    """What the scheduler itself knows, read when Prometheus asks."""

    def __init__(self, labels: tuple[str, ...], stats: Callable[[], ServingStats]) -> None:
        self._labels, self._stats = labels, stats

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """The gauges and counters of now."""
        stats = self._stats()
        yield self._gauge(RUNNING, stats.running)
        yield self._gauge(WAITING, stats.waiting)
        yield self._gauge(CACHE_USAGE, min(1.0, stats.running / stats.max_batch))
        yield self._counter(PROMPT_TOKENS, stats.prompt_tokens)
        yield self._counter(GENERATION_TOKENS, stats.generated_tokens)
        yield self._counter(PREFIX_QUERIES, stats.prefix_queries)
        yield self._counter(PREFIX_HITS, stats.prefix_hits)
        yield self._counter(DRAFTS, stats.drafts)
        yield self._counter(DRAFT_TOKENS, stats.drafted_tokens)
        yield self._counter(ACCEPTED_TOKENS, stats.accepted_tokens)
        ended = CounterMetricFamily(
            REQUEST_SUCCESS.name, REQUEST_SUCCESS.help, labels=[*LABELS, *REQUEST_SUCCESS.labels]
        )
        for reason, count in _by_reason(stats).items():
            ended.add_metric([*self._labels, reason], count)
        yield ended

    def _gauge(self, metric: Metric, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(metric.name, metric.help, labels=LABELS)
        family.add_metric(self._labels, value)
        return family

    def _counter(self, metric: Metric, value: float) -> CounterMetricFamily:
        family = CounterMetricFamily(metric.name, metric.help, labels=LABELS)
        family.add_metric(self._labels, value)
        return family


def _by_reason(stats: ServingStats) -> dict[str, int]:
    """Requests by vLLM's finished_reason; every reason is there from the start, so that rates have a beginning."""
    counts = {"stop": 0, "length": 0, "abort": 0}
    for reason, count in stats.ended.items():
        counts[finished_reason(reason)] += count
    return counts

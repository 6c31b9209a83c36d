"""The metrics of a service, under vLLM's names so that its dashboards work: the table, and what a request adds.

Names, labels and buckets are those of vLLM's production metrics
(https://docs.vllm.ai/en/latest/usage/metrics.html, vllm/v1/metrics/loggers.py). Nothing here needs a metrics library:
`starling serve` exports them by prometheus-client, the Triton model by Triton's custom metrics.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from starling.engine.generation.results import FinishReason, Timings
from starling.engine.pooling_loop import PoolingTimings

Kind = Literal["counter", "gauge", "histogram"]

#: Labels of every metric; `engine` is the index of the engine, here always 0.
LABELS = ("model_name", "engine")
#: The further label of `request_success`.
REASON_LABEL = "finished_reason"

_LATENCY = (
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    50.0,
    60.0,
    120.0,
    240.0,
    480.0,
    960.0,
)
_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0),
    *(80.0, 160.0, 640.0, 2560.0),
)
_PER_TOKEN = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_TOKENS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0, 20000.0, 50000.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. A counter's exported name ends in `_total`, which is not part of `name`; buckets are upper bounds."""

    name: str
    kind: Kind
    help: str
    buckets: tuple[float, ...] = ()
    #: Labels beside LABELS.
    labels: tuple[str, ...] = ()


RUNNING = Metric("vllm:num_requests_running", "gauge", "Requests that hold a row of the KV cache.")
WAITING = Metric("vllm:num_requests_waiting", "gauge", "Requests that wait for a row of the KV cache.")
CACHE_USAGE = Metric("vllm:kv_cache_usage_perc", "gauge", "Rows of the KV cache in use; 1 is all of them.")
PROMPT_TOKENS = Metric("vllm:prompt_tokens", "counter", "Prompt tokens prefilled.")
GENERATION_TOKENS = Metric("vllm:generation_tokens", "counter", "Tokens generated.")
PREFIX_QUERIES = Metric("vllm:prefix_cache_queries", "counter", "Prompt tokens looked up among known prefixes.")
PREFIX_HITS = Metric("vllm:prefix_cache_hits", "counter", "Prompt tokens copied from known prefixes, not prefilled.")
DRAFTS = Metric("vllm:spec_decode_num_drafts", "counter", "Drafts that were verified, one for each row and step.")
DRAFT_TOKENS = Metric("vllm:spec_decode_num_draft_tokens", "counter", "Drafted tokens that were verified.")
ACCEPTED_TOKENS = Metric("vllm:spec_decode_num_accepted_tokens", "counter", "Drafted tokens that were right.")
REQUEST_SUCCESS = Metric(
    "vllm:request_success", "counter", "Requests that came to an end, by its reason.", labels=(REASON_LABEL,)
)
TIME_TO_FIRST_TOKEN = Metric(
    "vllm:time_to_first_token_seconds",
    "histogram",
    "From the submission of a request to its first token.",
    _FIRST_TOKEN,
)
INTER_TOKEN_LATENCY = Metric(
    "vllm:inter_token_latency_seconds", "histogram", "Between two tokens of a request, each one counted.", _PER_TOKEN
)
#: The older name of INTER_TOKEN_LATENCY, which dashboards and load tools still read.
TIME_PER_OUTPUT_TOKEN = Metric(
    "vllm:time_per_output_token_seconds", "histogram", "As vllm:inter_token_latency_seconds.", _PER_TOKEN
)
REQUEST_TIME_PER_OUTPUT_TOKEN = Metric(
    "vllm:request_time_per_output_token_seconds", "histogram", "Mean time per output token of a request.", _PER_TOKEN
)
E2E_LATENCY = Metric(
    "vllm:e2e_request_latency_seconds", "histogram", "From the submission of a request to its last token.", _LATENCY
)
QUEUE_TIME = Metric("vllm:request_queue_time_seconds", "histogram", "A request's wait for a row.", _LATENCY)
PREFILL_TIME = Metric("vllm:request_prefill_time_seconds", "histogram", "A request's time in prefill.", _LATENCY)
DECODE_TIME = Metric("vllm:request_decode_time_seconds", "histogram", "A request's time in decode.", _LATENCY)
REQUEST_PROMPT_TOKENS = Metric("vllm:request_prompt_tokens", "histogram", "Prompt tokens of a request.", _TOKENS)
REQUEST_GENERATION_TOKENS = Metric(
    "vllm:request_generation_tokens", "histogram", "Tokens generated for a request.", _TOKENS
)

#: Set from the scheduler's own state whenever they are read.
STATE_METRICS = (
    *(RUNNING, WAITING, CACHE_USAGE, PROMPT_TOKENS, GENERATION_TOKENS),
    *(PREFIX_QUERIES, PREFIX_HITS, DRAFTS, DRAFT_TOKENS, ACCEPTED_TOKENS, REQUEST_SUCCESS),
)
#: Observed once for each request that comes to an end.
REQUEST_METRICS = (
    TIME_TO_FIRST_TOKEN,
    INTER_TOKEN_LATENCY,
    TIME_PER_OUTPUT_TOKEN,
    REQUEST_TIME_PER_OUTPUT_TOKEN,
    E2E_LATENCY,
    QUEUE_TIME,
    PREFILL_TIME,
    DECODE_TIME,
    REQUEST_PROMPT_TOKENS,
    REQUEST_GENERATION_TOKENS,
)

_ABORT = "abort"


def finished_reason(reason: FinishReason) -> str:
    """vLLM's word for why a request ended: stop, length, or abort for one that was not finished."""
    return reason if reason in ("stop", "length") else _ABORT


def observations(timings: Timings) -> Iterator[tuple[Metric, float]]:
    """What one finished request adds to REQUEST_METRICS; times in seconds. A request without a token adds no times."""
    yield REQUEST_PROMPT_TOKENS, timings.prompt_tokens
    yield REQUEST_GENERATION_TOKENS, timings.new_tokens
    if timings.new_tokens == 0:
        return
    yield QUEUE_TIME, timings.queue_s
    yield TIME_TO_FIRST_TOKEN, timings.ttft_s
    yield PREFILL_TIME, timings.ttft_s - timings.queue_s
    yield E2E_LATENCY, timings.total_s
    for seconds in timings.itl_s:
        yield INTER_TOKEN_LATENCY, seconds
        yield TIME_PER_OUTPUT_TOKEN, seconds
    if timings.itl_s:
        yield DECODE_TIME, timings.decode_s
        yield REQUEST_TIME_PER_OUTPUT_TOKEN, timings.decode_s / len(timings.itl_s)


def pooling_observations(timings: PoolingTimings) -> Iterator[tuple[Metric, float]]:
    """What one request for scores or embeddings adds, as vLLM counts them: it is prefill from its first run on."""
    yield REQUEST_PROMPT_TOKENS, timings.prompt_tokens
    if timings.reason != "stop":
        return
    yield QUEUE_TIME, timings.queue_s
    yield PREFILL_TIME, timings.total_s - timings.queue_s
    yield E2E_LATENCY, timings.total_s

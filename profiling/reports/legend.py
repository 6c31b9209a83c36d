"""The words of a report in plain ones: a line for each term that it shows, and none for the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from starling.profiling.reports.number_formats import LEAST_VALUES, NOT_GIVEN, STATISTICS, gives, latencies, rest_ms

Document = Mapping[str, Any]

TTFT = "time to first token, from the call"
ITL = "inter-token latency, from one token to the next"
_DRAFTED_ITL = "inter-token latency; of tokens verified together one has all of it"
TPOT = "time per output token: the mean of a run's inter-token latencies"
HOST = "a step outside the model's run: choosing the token, its text, stops"
LAST_ROW = "the slowest row of a run; their prompts are prefilled one by one"
_ROW = "one prompt of a batch, with its answer"
_LATENCY = "of a row: to its last token, but for the prefills of later rows"
_ROOF = "the least time that memory or arithmetic allow, of the time taken"
_CACHES = "above it, the weights come from the processor's caches"
_REST = "the runtime's own work, and the profiler's"
_OVERLAP = "the operators ran side by side"
_FEW = "too few values for this percentile: p90 needs {p90}, p95 {p95}, p99 {p99}".format(**LEAST_VALUES)


def legend(document: Document) -> dict[str, str]:
    """Term and meaning, in the order of a report."""
    points = document["measurements"]
    drafted = any(measured.get("speculation") for measured in points)
    terms = {
        "TTFT": TTFT,
        "ITL": _DRAFTED_ITL if drafted else ITL,
        "TPOT": TPOT,
        "host time": HOST,
        "n": "how many values",
    }
    if any(_leaves_out(measured) for measured in points):
        terms[NOT_GIVEN] = _FEW
    if any(measured["batch"] > 1 for measured in points):
        terms |= {"row": _ROW, "last row": LAST_ROW, "latency": _LATENCY}
    roofs = [roof for measured in points for roof in _roofs(measured)]
    if roofs:
        terms["roof"] = _ROOF
    if any(roof["share"] > 1 for roof in roofs):
        terms["over 100%"] = _CACHES
    return terms


def operators_legend(operators: Document) -> dict[str, str]:
    """The same for the table of operators."""
    rests = [rest_ms(operators[phase]) for phase in ("prefill", "decode")]
    terms = {"executor and profiler": _REST} if any(rest is not None for rest in rests) else {}
    return {**terms, "over 100%": _OVERLAP} if None in rests else terms


def _leaves_out(measured: Document) -> bool:
    counts = [measured[key]["count"] for key in (*latencies(measured), "host_us_per_step")]
    return not all(gives(count, name) for count in counts for name in STATISTICS)


def _roofs(measured: Document) -> Iterable[Document]:
    return (measured[f"{phase}_roof"] for phase in ("prefill", "decode") if measured[f"{phase}_roof"] is not None)

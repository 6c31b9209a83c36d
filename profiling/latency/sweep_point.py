"""Run one point of a sweep on an engine, and its latencies under their standard names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from starling.engine.engine import Engine
from starling.engine.generation.results import Timings
from starling.profiling.distribution import Distribution, distribution
from starling.profiling.exact_prompts import prompt_tokens
from starling.profiling.latency.sweep_settings import Point, Sweep
from starling.profiling.machine.gpu_monitor import GpuUse, watch_gpu

#: One run: the timings of each of its rows, as the engine saw them.
Run = tuple[Timings, ...]


@dataclass(frozen=True, slots=True)
class Drafts:
    """What came of speculation, over all runs of a point."""

    drafted_tokens: int
    accepted_tokens: int
    #: accepted / drafted.
    acceptance: float
    #: Tokens that a run of the model gave after the first token; 1 without speculation.
    tokens_per_run: float


@dataclass(frozen=True, slots=True)
class Latencies:
    """What the measured `runs` of one point took; the `warmup` runs before them count nowhere.

    Names and definitions as in NVIDIA's AIPerf: TTFT from the call to the first token; ITL between one token and the
    next; TPOT (last - first) / (n - 1) of a request; request latency from the call to the last token. In ms.
    """

    point: Point
    warmup: tuple[Run, ...]
    runs: tuple[Run, ...]
    #: None without an NVIDIA GPU.
    gpu: GpuUse | None

    @property
    def ttft_ms(self) -> Distribution:
        """Time to first token; a batch's rows are prefilled one after the other, and each counts."""
        return distribution(row.ttft_ms for run in self.runs for row in run)

    @property
    def last_row_ttft_ms(self) -> Distribution:
        """Of each run the TTFT of the row that waited longest; with one row the same as `ttft_ms`."""
        return distribution(max(row.ttft_ms for row in run) for run in self.runs)

    @property
    def itl_ms(self) -> Distribution:
        """Inter-token latency. A step's time is the same for every row: counting each row's would only repeat it."""
        return distribution(seconds * 1e3 for run in self.runs for seconds in run[0].itl_s)

    @property
    def tpot_ms(self) -> Distribution:
        """Time per output token, one value a run."""
        return distribution(run[0].tpot_ms for run in self.runs)

    @property
    def request_latency_ms(self) -> Distribution:
        """TTFT and decode steps of each row: from the call to its last token, but for the prefills of later rows."""
        return distribution(row.total_s * 1e3 for run in self.runs for row in run)

    @property
    def last_row_latency_ms(self) -> Distribution:
        """Of each run the request latency of the row that took longest: from the call to the batch's last token."""
        return distribution(max(row.total_s for row in run) * 1e3 for run in self.runs)

    @property
    def host_us(self) -> Distribution:
        """Host time of each decode step, outside the model's run (choosing, detokenizing, stop checks), in µs."""
        return distribution(seconds * 1e6 for run in self.runs for seconds in run[0].host_s)

    @property
    def speeds(self) -> list[float]:
        """Decode tokens per second of one row, for each run."""
        return [run[0].tokens_per_second for run in self.runs]

    @property
    def itl_by_position_ms(self) -> list[float]:
        """Median over the runs of the gap before each token, in their order."""
        return [median(gaps) * 1e3 for gaps in zip(*(run[0].itl_s for run in self.runs), strict=True)]

    @property
    def drafts(self) -> Drafts | None:
        """Acceptance of drafts; None where none were made."""
        rows = [row for run in self.runs for row in run]
        drafted, accepted = sum(row.drafted_tokens for row in rows), sum(row.accepted_tokens for row in rows)
        if not drafted:
            return None
        decoded = sum(len(row.itl_s) for row in rows)
        return Drafts(drafted, accepted, accepted / drafted, decoded / (decoded - accepted))

    @property
    def prefill_model_s(self) -> float:
        """Seconds that the model's runs of one row's prefill take, the median."""
        return median(row.prefill_model_s for run in self.runs for row in run)

    @property
    def decode_step_s(self) -> float:
        """Seconds from one token of a row to the next, the median over the steps."""
        return median(gap for run in self.runs for gap in run[0].itl_s)

    @property
    def decode_model_s(self) -> float:
        """Seconds that the model's run of one decode step takes, the median over the steps."""
        return median(step - host for run in self.runs for step, host in zip(run[0].itl_s, run[0].host_s, strict=True))


def measure_latencies(
    engine: Engine, point: Point, sweep: Sweep, progress: Callable[[str], None] = lambda text: None
) -> Latencies:
    """Run the engine, which has at least the point's rows and positions.

    Greedy decoding that goes on after end tokens, from prompts of real sentences, different ones in every row and run.
    """
    runs: list[Run] = []
    with watch_gpu(engine.backend.provider) as gpu:
        for number in range(sweep.warmup + sweep.repeats):
            if number == sweep.warmup:
                gpu.begin()
            warm = number - sweep.warmup + 1
            progress("warming up" if warm < 1 else f"repeat {warm} of {sweep.repeats}")
            runs.append(_run(engine, point, first=number * point.batch))
    tokens = sweep.repeats * point.batch * point.new_tokens
    return Latencies(point, tuple(runs[: sweep.warmup]), tuple(runs[sweep.warmup :]), gpu.use(tokens))


def _run(engine: Engine, point: Point, *, first: int) -> Run:
    prompts = [prompt_tokens(engine.tokenizer, point.prompt_tokens, first + row) for row in range(point.batch)]
    results = engine.generate(prompts, max_tokens=point.new_tokens, ignore_eos=True)
    return tuple(result.timings for result in results)

"""Measure a bundle: load time, latencies, decode speed, host time, memory, and the bandwidth reached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from starling.engine.backend import default_threads
from starling.engine.bundle import Bundle
from starling.engine.engine import Engine
from starling.engine.errors import UserError
from starling.engine.results import GenerationResult, Timings
from starling.profiling.bandwidth import Bandwidth, decode_bandwidth
from starling.profiling.machine import Machine, describe_machine, peak_rss_bytes
from starling.profiling.prompts import prompt_tokens
from starling.profiling.statistics import Distribution, distribution

CPU_PROVIDER = "CPUExecutionProvider"
NOT_MEASURED = "not measured on this provider"


@dataclass(frozen=True, slots=True)
class ProfileSettings:
    """What to run: `repeats` measured generations behind `warmup` unmeasured ones, each of `batch` rows.

    Raises UserError for a count below 1, or fewer than two new tokens (decoding begins with the second).
    """

    prompt_tokens: int = 128
    new_tokens: int = 128
    batch: int = 1
    repeats: int = 5
    warmup: int = 1

    def __post_init__(self) -> None:
        least = {"prompt_tokens": 1, "new_tokens": 2, "batch": 1, "repeats": 1, "warmup": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value < bound:
                raise UserError(f"--{name.replace('_', '-')} is {value}: give {bound} or more")

    def positions(self, bundle: Bundle, max_seq: int | None = None) -> int:
        """Positions for the KV cache: `max_seq`, else as many as the run needs. Raises UserError for too few."""
        needed, most = self.prompt_tokens + self.new_tokens, bundle.architecture.max_positions
        room, what = (most, "this model has") if max_seq is None else (max_seq, "--max-seq is")
        if needed > room:
            raise UserError(
                f"{self.prompt_tokens} prompt tokens and {self.new_tokens} new ones need {needed} positions, but "
                f"{what} {room}: lower --prompt-tokens or --new-tokens"
            )
        return max_seq or needed


@dataclass(frozen=True, slots=True)
class Profile:
    """The measurement. Latencies in ms; `timings` has every measured run's rows, as the engine saw them.

    `decode_tokens_per_second` is of one row, the median over the repeats; all rows together are `batch` times that.
    """

    settings: ProfileSettings
    machine: Machine
    provider: str
    threads: int
    max_seq: int
    load_s: float
    ttft_ms: Distribution
    itl_ms: Distribution
    tpot_ms: Distribution
    request_latency_ms: Distribution
    decode_tokens_per_second: float
    slowest_tokens_per_second: float
    fastest_tokens_per_second: float
    #: Host time of a decode step outside the model's run (choosing, detokenizing, stop checks), in µs.
    host_us_per_step: float
    peak_rss_bytes: int
    kv_cache_bytes: int
    #: None on a provider whose memory is not measured yet.
    bandwidth: Bandwidth | None
    timings: tuple[tuple[Timings, ...], ...]

    @property
    def total_tokens_per_second(self) -> float:
        """Decode tokens of all rows per second."""
        return self.decode_tokens_per_second * self.settings.batch


def measure(
    engine: Engine,
    settings: ProfileSettings,
    *,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Profile:
    """Run the engine, which must be fresh and have `batch` rows, and measure it; `threads` as it was opened with.

    Greedy decoding that goes on behind end tokens, from prompts of real sentences, different ones in every row and run.
    """
    runs: list[tuple[Timings, ...]] = []
    for number in range(-settings.warmup, settings.repeats):
        progress("warming up" if number < 0 else f"repeat {number + 1} of {settings.repeats}")
        results = _run(engine, settings, first=(settings.warmup + number) * settings.batch)
        if number >= 0:
            runs.append(tuple(result.timings for result in results))
    peak = peak_rss_bytes()  # before the bandwidth is measured, which takes memory of its own
    speeds = [run[0].tokens_per_second for run in runs]
    threads = threads or default_threads()
    progress("measuring the machine's memory bandwidth")
    return Profile(
        settings=settings,
        machine=describe_machine(),
        provider=engine.backend.provider,
        threads=threads,
        max_seq=engine.max_seq,
        load_s=engine.load_seconds,
        ttft_ms=distribution(row.ttft_ms for run in runs for row in run),
        # A step's time is the same for every row: counting each row's would only repeat it.
        itl_ms=distribution(seconds * 1e3 for run in runs for seconds in run[0].itl_s),
        tpot_ms=distribution(run[0].tpot_ms for run in runs),
        request_latency_ms=distribution(_request_ms(row) for run in runs for row in run),
        decode_tokens_per_second=median(speeds),
        slowest_tokens_per_second=min(speeds),
        fastest_tokens_per_second=max(speeds),
        host_us_per_step=median(run[0].host_s_per_token for run in runs) * 1e6,
        peak_rss_bytes=peak,
        kv_cache_bytes=engine.kv_cache_bytes,
        bandwidth=_bandwidth(engine, settings, median(speeds), threads),
        timings=tuple(runs),
    )


def _request_ms(row: Timings) -> float:
    return row.total_s * 1e3


def _run(engine: Engine, settings: ProfileSettings, *, first: int) -> list[GenerationResult]:
    prompts = [prompt_tokens(engine.tokenizer, settings.prompt_tokens, first + row) for row in range(settings.batch)]
    return engine.generate(prompts, max_tokens=settings.new_tokens, ignore_eos=True)


def _bandwidth(engine: Engine, settings: ProfileSettings, steps_per_second: float, threads: int) -> Bandwidth | None:
    if engine.backend.provider != CPU_PROVIDER:
        return None
    return decode_bandwidth(
        engine.bundle,
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
        batch=settings.batch,
        steps_per_second=steps_per_second,
        threads=threads,
    )


def profile_json(profile: Profile, bundle: Bundle) -> dict[str, Any]:
    """The document of `profile --json`: AIPerf's metric names with their units; bytes, and bytes per second."""
    return {
        "format": "starling-profile",
        "format_version": 1,
        "bundle": {name: bundle.raw[name] for name in ("source", "dialect", "dtype", "quantization")},
        "machine": asdict(profile.machine),
        "settings": asdict(profile.settings),
        "provider": profile.provider,
        "threads": profile.threads,
        "load_s": profile.load_s,
        "time_to_first_token_ms": asdict(profile.ttft_ms),
        "inter_token_latency_ms": asdict(profile.itl_ms),
        "time_per_output_token_ms": asdict(profile.tpot_ms),
        "request_latency_ms": asdict(profile.request_latency_ms),
        "decode_tokens_per_second": {
            "per_row": profile.decode_tokens_per_second,
            "total": profile.total_tokens_per_second,
            "slowest_repeat": profile.slowest_tokens_per_second,
            "fastest_repeat": profile.fastest_tokens_per_second,
        },
        "host_us_per_step": profile.host_us_per_step,
        "peak_rss_bytes": profile.peak_rss_bytes,
        "kv_cache": {"bytes": profile.kv_cache_bytes, "rows": profile.settings.batch, "max_seq": profile.max_seq},
        "bandwidth": _bandwidth_json(profile.bandwidth),
        "runs": [[asdict(row) for row in run] for run in profile.timings],
    }


def _bandwidth_json(bandwidth: Bandwidth | None) -> dict[str, Any]:
    if bandwidth is None:
        return {"measured": False, "reason": NOT_MEASURED}
    return {"measured": True, **asdict(bandwidth), "share": bandwidth.share}

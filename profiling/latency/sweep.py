"""Measure a bundle on this machine: every point of a sweep, and what is measured once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from starling.engine.backends.backend import Backend
from starling.engine.backends.onnxruntime.cpu_session import import_onnxruntime
from starling.engine.backends.onnxruntime.onnxruntime_backend import why_not_on_cuda
from starling.engine.bundle.manifest import Bundle
from starling.engine.engine import Engine
from starling.engine.errors import UserError
from starling.engine.host import default_threads
from starling.engine.names import DType
from starling.engine.progress import Progress, Silent
from starling.profiling.latency.cold_start import ColdStart, measure_cold_start
from starling.profiling.latency.nvtx_ranges import RangedBackend
from starling.profiling.latency.sweep_point import Latencies, measure_latencies
from starling.profiling.latency.sweep_settings import Point, Sweep
from starling.profiling.machine.describe import peak_rss_bytes
from starling.profiling.machine.environment import Environment, describe_environment
from starling.profiling.machine.peaks import CPU_PROVIDER, MachinePeaks, measure_peaks
from starling.profiling.machine.roofline import Roof, decode_work, prefill_work, under_roof
from starling.profiling.operators.onnxruntime_operators import profile_ort_operators
from starling.profiling.operators.operator_times import OperatorProfile
from starling.profiling.operators.tensorrt_operators import profile_tensorrt_operators
from starling.profiling.reports.number_formats import load_warning, size


@dataclass(frozen=True, slots=True)
class Options:
    """How the bundle is opened, and what is measured beside the latencies."""

    backend: str = "auto"
    engine: str | None = None
    threads: int | None = None
    kv_dtype: DType | None = None
    max_seq: int | None = None
    cold_start: bool = True
    operators: bool = False
    nvtx: bool = False
    speculation: str | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """One point: its latencies, and how near prefill and decode came to the machine's roof (None: it has no figure).

    Decode has none where drafts were verified: there a run of the model is no decode step.
    """

    latencies: Latencies
    prefill: Roof | None
    decode: Roof | None


@dataclass(frozen=True, slots=True)
class Profile:
    """Everything that was measured. In bytes; `peak_rss_bytes` is the process's, before the peaks' own arrays."""

    environment: Environment
    bundle: Bundle
    sweep: Sweep
    backend: str
    provider: str
    note: str | None
    kernels: str | None
    kernels_note: str | None
    speculation: str | None
    threads: int
    max_seq: int
    load_s: float
    cold_start: ColdStart | None
    kv_cache_bytes: int
    peak_rss_bytes: int
    peaks: MachinePeaks | None
    measurements: tuple[Measurement, ...]
    operators: OperatorProfile | None


def measure(
    bundle: Bundle,
    sweep: Sweep,
    options: Options,
    progress: Progress | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> Profile:
    """Measure `bundle`, one point after the other on one engine; `warn` gets, before the first, what will spoil them.

    Raises UserError for settings beyond the model's positions, BackendError where it cannot be run.
    """
    bundle = bundle.with_kv_dtype(options.kv_dtype)
    positions = sweep.positions(bundle, options.max_seq)
    environment, steps = describe_environment(), _Steps(sweep, options, progress or Silent())
    _require_memory(bundle, sweep, options.backend, positions, environment.machine["memory_available_bytes"])
    cold = _cold_start(bundle, sweep, options, positions, steps) if options.cold_start else None
    steps.next("loading")
    with Engine(
        bundle,
        backend=options.backend,
        engine=options.engine,
        max_seq=positions,
        max_batch=sweep.max_batch,
        threads=options.threads,
        speculation=options.speculation,
    ) as engine:
        if options.nvtx:
            engine.backend = RangedBackend(engine.backend)
        if (warning := load_warning(asdict(environment))) is not None:
            warn(warning)
        latencies = [measure_latencies(engine, point, sweep, steps.of(point)) for point in sweep.points]
        backend, load_s, cache = engine.backend, engine.load_seconds, engine.kv_cache_bytes
    peak, threads = peak_rss_bytes(), options.threads or default_threads()
    steps.next("measuring the machine's bandwidth and arithmetic")
    peaks = measure_peaks(bundle, backend.provider, threads)
    return Profile(
        environment=environment,
        bundle=bundle,
        sweep=sweep,
        backend=backend.name,
        provider=backend.provider,
        note=backend.note,
        kernels=backend.kernels,
        kernels_note=backend.kernels_note,
        speculation=options.speculation,
        threads=threads,
        max_seq=positions,
        load_s=load_s,
        cold_start=cold,
        kv_cache_bytes=cache,
        peak_rss_bytes=peak,
        peaks=peaks,
        measurements=tuple(_measurement(bundle, backend, measured, peaks) for measured in latencies),
        operators=_operators(bundle, sweep, options, backend, positions, steps) if options.operators else None,
    )


class _Steps:
    """Counts the steps of a profile for its progress."""

    def __init__(self, sweep: Sweep, options: Options, progress: Progress) -> None:
        runs = len(sweep.points) * (sweep.warmup + sweep.repeats)
        self._total = options.cold_start + 1 + runs + 1 + options.operators
        self._progress, self._done = progress, 0

    def next(self, text: str) -> None:
        self._progress.phase(text)
        self._progress.steps(self._done, self._total)
        self._done += 1

    def of(self, point: Point) -> Callable[[str], None]:
        where = f"{point.prompt_tokens} prompt + {point.new_tokens} new tokens, batch {point.batch}"
        return lambda text: self.next(f"{where}: {text}")


def _cold_start(bundle: Bundle, sweep: Sweep, options: Options, positions: int, steps: _Steps) -> ColdStart:
    steps.next("starting a fresh process")
    return measure_cold_start(
        Path(bundle.folder),
        prompt_tokens=sweep.prompt_tokens[0],
        max_seq=positions,
        backend=options.backend,
        engine=options.engine,
        threads=options.threads,
        kv_dtype=options.kv_dtype,
    )


def _require_memory(bundle: Bundle, sweep: Sweep, backend: str, positions: int, free: int) -> None:
    """Raises UserError for a KV cache that this machine cannot hold; opening takes it, and writing to it fails."""
    cache = bundle.kv_cache.bytes_per_token * positions * sweep.max_batch
    if bundle.dialect != "ort" or backend.startswith("tensorrt") or cache <= free:
        return
    if backend == "onnxruntime-cpu" or why_not_on_cuda(import_onnxruntime(), bundle) is not None:
        raise UserError(
            f"--batch {sweep.max_batch} with {positions} positions a row needs a KV cache of {size(cache)}, and "
            f"{size(free)} of memory is free: lower --batch, --prompt-tokens or --max-seq"
        )


def _measurement(bundle: Bundle, backend: Backend, latencies: Latencies, peaks: MachinePeaks | None) -> Measurement:
    if peaks is None:
        return Measurement(latencies, None, None)
    point = latencies.point
    limits = {
        "operations_per_second": peaks.arithmetic.operations_per_second,
        "bytes_per_second": peaks.read_bytes_per_second,
    }
    prefill = prefill_work(bundle, point.prompt_tokens, backend.prefill_chunk)
    decode = decode_work(bundle, point.prompt_tokens, point.new_tokens, point.batch)
    # Where steps are launched ahead the host waits for a part of each only.
    decode_s = latencies.decode_model_s if backend.steps_ahead is None else latencies.decode_step_s
    return Measurement(
        latencies,
        under_roof(prefill, latencies.prefill_model_s, **limits),
        None if latencies.drafts is not None else under_roof(decode, decode_s, **limits),
    )


def _operators(
    bundle: Bundle, sweep: Sweep, options: Options, measured: Backend, positions: int, steps: _Steps
) -> OperatorProfile:
    """By the profiler of the runtime that was measured, on a backend of its own."""
    steps.next("timing every operator")
    prompt, batch = sweep.prompt_tokens[0], sweep.batch[0]
    if measured.name == "onnxruntime":
        threads = options.threads or default_threads()
        on_gpu = measured.provider != CPU_PROVIDER
        return profile_ort_operators(bundle, prompt=prompt, batch=batch, threads=threads, on_gpu=on_gpu)
    return profile_tensorrt_operators(
        bundle,
        runtime=measured.name,
        engine=options.engine,
        prompt=prompt,
        batch=batch,
        max_seq=positions,
        max_batch=sweep.max_batch,
    )

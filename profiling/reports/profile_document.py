"""A profile as the JSON document that programs read; its schema is docs/profile-schema.md."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import UserError
from starling.profiling.latency.sweep import Measurement, Profile
from starling.profiling.latency.sweep_point import Latencies, Run
from starling.profiling.machine.peaks import MachinePeaks
from starling.profiling.machine.roofline import Roof
from starling.profiling.operators.operator_times import OperatorProfile, PhaseTime

FORMAT, FORMAT_VERSION = "starling-profile", 2
#: What a document of this version always has.
_FIELDS = (
    *("environment", "bundle", "run", "load_s", "cold_start"),
    *("memory", "machine_peaks", "measurements", "operators"),
)


def profile_document(profile: Profile) -> dict[str, Any]:
    """The document. Units stand in the names: _ms, _us, _s, _bytes, _per_second."""
    sweep = profile.sweep
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "environment": asdict(profile.environment),
        "bundle": bundle_document(profile.bundle),
        "run": {
            "backend": profile.backend,
            "provider": profile.provider,
            "note": profile.note,
            "kernels": profile.kernels,
            "kernels_note": profile.kernels_note,
            "threads": profile.threads,
            "repeats": sweep.repeats,
            "warmup": sweep.warmup,
            "decoding": "greedy",
            "speculation": profile.speculation,
        },
        "load_s": profile.load_s,
        "cold_start": None if profile.cold_start is None else asdict(profile.cold_start),
        "memory": {
            "weights_bytes": profile.bundle.weights.bytes,
            "kv_cache_bytes": profile.kv_cache_bytes,
            "kv_cache_rows": sweep.max_batch,
            "kv_cache_positions": profile.max_seq,
            "peak_rss_bytes": profile.peak_rss_bytes,
        },
        "machine_peaks": _peaks(profile.peaks),
        "measurements": [_measurement(measured) for measured in profile.measurements],
        "operators": _operators(profile.operators),
    }


def bundle_document(bundle: Bundle) -> dict[str, Any]:
    """What a result says of the bundle that it is about."""
    return {
        "folder": bundle.folder.name,
        **{name: bundle.raw[name] for name in ("source", "dialect", "dtype", "quantization")},
        "model_type": bundle.architecture.model_type,
        "parameters": bundle.architecture.parameters,
        "layers": bundle.architecture.layers,
        "weights_bytes": bundle.weights.bytes,
        "weights_bytes_per_token": bundle.weights.bytes_per_token,
        "kv_dtype": bundle.kv_cache.dtype,
        "kv_cache_bytes_per_token": bundle.kv_cache.bytes_per_token,
        "weights_sha256": _weights_sha256(bundle),
    }


def read_profile(file: Path) -> dict[str, Any]:
    """The document in `file`. Raises UserError where it cannot be read or is not one of this version."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}; give a file of profile --output") from error
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); give a file of profile --output") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UserError(f'{file} does not say "format": "{FORMAT}"; give a file of profile --output')
    if document.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{file} has format_version {document.get('format_version')!r}, this Starling reads {FORMAT_VERSION}: "
            "profile the bundle again"
        )
    missing = [name for name in _FIELDS if name not in document]
    if missing:
        raise UserError(f"{file} has no {', '.join(missing)}: it is not whole; profile the bundle again")
    return document


def _weights_sha256(bundle: Bundle) -> dict[str, str]:
    return {name: record.sha256 for name, record in bundle.files.items() if ".onnx" in name}


def _peaks(peaks: MachinePeaks | None) -> dict[str, Any] | None:
    if peaks is None:
        return None
    return {
        "read_bytes_per_second": peaks.read_bytes_per_second,
        "read_how": peaks.read_how,
        "operations_per_second": peaks.arithmetic.operations_per_second,
        "operations_how": peaks.arithmetic.how,
        "products": peaks.arithmetic.measured,
    }


def _measurement(measured: Measurement) -> dict[str, Any]:
    latencies = measured.latencies
    return {
        **asdict(latencies.point),
        "time_to_first_token_ms": asdict(latencies.ttft_ms),
        "time_to_first_token_last_row_ms": asdict(latencies.last_row_ttft_ms),
        "inter_token_latency_ms": asdict(latencies.itl_ms),
        "time_per_output_token_ms": asdict(latencies.tpot_ms),
        "request_latency_ms": asdict(latencies.request_latency_ms),
        "request_latency_last_row_ms": asdict(latencies.last_row_latency_ms),
        "host_us_per_step": asdict(latencies.host_us),
        "output_tokens_per_second": _speeds(latencies),
        "inter_token_latency_by_position_ms": latencies.itl_by_position_ms,
        "speculation": None if latencies.drafts is None else asdict(latencies.drafts),
        "prefill_roof": _roof(measured.prefill),
        "decode_roof": _roof(measured.decode),
        "gpu": None if latencies.gpu is None else asdict(latencies.gpu),
        "warmup_runs": [_run(run) for run in latencies.warmup],
        "runs": [_run(run) for run in latencies.runs],
    }


def _speeds(latencies: Latencies) -> dict[str, float]:
    """Decode only, of one row: the median run, the slowest and the fastest; and all rows of the median run together."""
    speeds = sorted(latencies.speeds)
    middle = len(speeds) // 2
    per_row = speeds[middle] if len(speeds) % 2 else (speeds[middle - 1] + speeds[middle]) / 2
    return {
        "per_row": per_row,
        "total": per_row * latencies.point.batch,
        "slowest_run": speeds[0],
        "fastest_run": speeds[-1],
    }


def _run(run: Run) -> list[dict[str, Any]]:
    return [asdict(row) for row in run]


def _roof(roof: Roof | None) -> dict[str, Any] | None:
    if roof is None:
        return None
    return {
        "operations": roof.work.operations,
        "bytes": roof.work.bytes,
        "model_s": roof.seconds,
        "roof_s": roof.roof_seconds,
        "bound": roof.bound,
        "share": roof.share,
        "operations_per_second": roof.operations_per_second,
        "bytes_per_second": roof.bytes_per_second,
    }


def _operators(operators: OperatorProfile | None) -> dict[str, Any] | None:
    if operators is None:
        return None
    return {
        "profiler": operators.profiler,
        "prompt_tokens": operators.prompt_tokens,
        "batch": operators.batch,
        "prefill": _phase(operators.prefill),
        "decode": _phase(operators.decode),
    }


def _phase(phase: PhaseTime) -> dict[str, Any]:
    return {
        "runs": phase.runs,
        "run_ms": phase.run_ms,
        "operators_ms": phase.operators_ms,
        "parts_ms": phase.by_part(),
        "operators": [asdict(row) for row in phase.operators],
    }

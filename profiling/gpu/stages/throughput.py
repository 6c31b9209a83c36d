"""The 7B shape on ONNX Runtime: time of a step and to the first token, memory, for batches, prompts, settings."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch

from starling.engine.bundle.manifest import Bundle
from starling.engine.kernels.cuda import operators
from starling.profiling.gpu.stages.correctness import divergence, how
from starling.profiling.gpu.stages.kit import Kit
from starling.profiling.gpu.stages.large_weights import PROMPT, reference_ids, reference_logits
from starling.profiling.gpu.stages.random_bundles import bytes_per_token

POSITIONS = 2304
_ROWS, _PROMPTS = (1, 4, 16), (128, 2048)
_DRY_POSITIONS, _DRY_ROWS, _DRY_PROMPTS = 128, (1, 2), (32,)
_CHUNKS, _CHUNKED_PROMPT = (256, 512, 1024), 2048
#: Prompts that our int8 kernels run in slices of 16 tokens, and longer ones, whose weights are dequantized.
_FIRST_TOKENS = (16, 17, 32, 48, 49, 128, 512, 1024, 2048)
_WEIGHT_BLOCKS = (16, 32, 64, 128, 256)
_FED_STEPS, _LAUNCHED_STEPS, _PREFILLS = 24, 64, 7
_WARM = 6
_DRY_FED_STEPS, _DRY_PREFILLS = 4, 2


@dataclass(frozen=True, slots=True)
class Setup:
    """How a bundle is opened; `label` names it in the results."""

    label: str
    kernels: bool = False
    capture: bool = True
    settings: Mapping[str, str] = field(default_factory=dict)


OURS, RUNTIMES = Setup("our kernels", kernels=True), Setup("ONNX Runtime's kernels")
#: A/B of what is on by default.
CHANGED = (
    Setup("ONNX Runtime's kernels, not captured", capture=False),
    Setup("ep.cuda.fpa_intb_gemm 0", settings={"ep.cuda.fpa_intb_gemm": "0"}),
    Setup("weights in the arena", settings={"session.use_device_allocator_for_initializers": "0"}),
    Setup("our kernels, not captured", kernels=True, capture=False),
)


def run_fp16(kit: Kit) -> None:
    """Against PyTorch, all batches and prompts, and a long prompt in pieces."""
    bundle = Bundle.open(kit.work / kit.large("fp16"))
    with kit.results.guarded(what="against PyTorch"):
        against_torch(kit, bundle, RUNTIMES)
    measure(kit, bundle, RUNTIMES, _rows(kit))
    chunks(kit, bundle, RUNTIMES)


def run_int8(kit: Kit) -> None:
    """Our kernels and ONNX Runtime's in turn, so that both meet the card in the same state."""
    bundle = Bundle.open(kit.work / kit.large("int8-fp16"))
    setups = (OURS, RUNTIMES) if kit.machine.is_card else (RUNTIMES,)
    for setup in setups:
        with kit.results.guarded(what="against PyTorch", label=setup.label):
            against_torch(kit, bundle, setup)
    for rows in _rows(kit):
        for setup in setups:
            measure(kit, bundle, setup, (rows,))
    for setup in setups:
        chunks(kit, bundle, setup)


def run_settings(kit: Kit) -> None:
    """One row, with each setting changed."""
    bundle = Bundle.open(kit.work / kit.large("int8-fp16"))
    for setup in CHANGED if kit.machine.is_card else CHANGED[:1]:
        measure(kit, bundle, setup, (1,))
    bundle = Bundle.open(kit.work / kit.large("fp16"))
    measure(kit, bundle, CHANGED[0], (1,))


def run_first_tokens(kit: Kit) -> None:
    """TTFT by the prompt's length: fp16, and int8 with our kernels, by the size of a block of dequantized weights."""
    for precision, setup in (("fp16", RUNTIMES), ("int8-fp16", RUNTIMES)):
        with kit.results.guarded(label=setup.label, precision=precision):
            _first_tokens(kit, kit.large(precision), setup)
    for megabytes in _WEIGHT_BLOCKS if kit.machine.is_card else ():
        with kit.results.guarded(label=OURS.label, weight_block_mb=megabytes):
            operators.WEIGHTS_BYTES, before = megabytes << 20, operators.WEIGHTS_BYTES
            try:
                _first_tokens(kit, kit.large("int8-fp16"), OURS, weight_block_mb=megabytes)
            finally:
                operators.WEIGHTS_BYTES = before


def _first_tokens(kit: Kit, name: str, setup: Setup, **what: int) -> None:
    positions = POSITIONS if kit.machine.is_card else _DRY_POSITIONS
    backend = open_backend(kit, Bundle.open(kit.work / name), setup, rows=1, positions=positions)
    try:
        for prompt in _FIRST_TOKENS if kit.machine.is_card else _DRY_PROMPTS:
            ids = np.random.default_rng(1).integers(3, 30000, prompt)
            ttft = timed_ms(lambda _, ids=ids: backend.prefill(0, ids, 0).tokens(), _PREFILLS, 1)  # type: ignore[misc]
            kit.results.write(bundle=name, label=setup.label, prompt=prompt, first_token_ms=round(ttft, 2), **what)
    finally:
        backend.close()
        gc.collect()


def _rows(kit: Kit) -> tuple[int, ...]:
    return _ROWS if kit.machine.is_card else _DRY_ROWS


def against_torch(kit: Kit, bundle: Bundle, setup: Setup) -> None:
    """Logits against PyTorch's in fp16 on the same weights."""
    wanted, ids = reference_logits(kit.work), reference_ids()
    backend = open_backend(kit, bundle, setup, rows=1, positions=512)
    try:
        got = [backend.prefill(0, ids[:PROMPT], 0).logits()[0].copy()]
        for position in range(PROMPT, len(ids)):
            got.append(backend.decode([int(ids[position])], [position]).logits()[0].copy())
        figures = divergence(wanted, torch.from_numpy(np.stack(got).astype(np.float32)))
        kit.results.write(bundle=bundle.folder.name, against="PyTorch", label=setup.label, **how(backend), **figures)
    finally:
        backend.close()
        gc.collect()


def open_backend(kit: Kit, bundle: Bundle, setup: Setup, *, rows: int, positions: int, chunk: int | None = None) -> Any:
    """The bundle on the machine, as `setup` says."""
    return kit.machine.open(
        bundle,
        rows=rows,
        positions=positions,
        chunk=chunk,
        capture=setup.capture,
        kernels=setup.kernels,
        settings=setup.settings,
    )


def measure(kit: Kit, bundle: Bundle, setup: Setup, batches: tuple[int, ...]) -> None:
    """For each batch: opening, every prompt length, memory."""
    for rows in batches:
        with kit.results.guarded(label=setup.label, rows=rows):
            _measure_batch(kit, bundle, setup, rows)


def _measure_batch(kit: Kit, bundle: Bundle, setup: Setup, rows: int) -> None:
    before, begin = kit.machine.memory_in_use(), perf_counter()
    positions = POSITIONS if kit.machine.is_card else _DRY_POSITIONS
    backend = open_backend(kit, bundle, setup, rows=rows, positions=positions)
    opened_s = perf_counter() - begin
    try:
        weights = bytes_per_token(kit, bundle.folder.name)
        for prompt in _PROMPTS if kit.machine.is_card else _DRY_PROMPTS:
            line = _measure_prompt(kit, backend, rows, prompt, weights)
            kit.results.write(bundle=bundle.folder.name, how="starling", label=setup.label, **line)
        kit.results.write(
            bundle=bundle.folder.name,
            label=setup.label,
            rows=rows,
            opened_s=round(opened_s, 2),
            device_memory=kit.machine.memory_in_use() - before,
            weights=bundle.weights.bytes,
            cache=backend.kv_cache_bytes,
            **how(backend),
        )
    finally:
        backend.close()
        del backend
        gc.collect()


def _measure_prompt(kit: Kit, backend: Any, rows: int, prompt: int, weights: int) -> dict[str, Any]:
    ids = np.random.default_rng(1).integers(3, 30000, prompt)
    for row in range(rows):
        backend.prefill(row, ids, 0)
    ttft = None
    if rows == 1:
        prefills = _PREFILLS if kit.machine.is_card else _DRY_PREFILLS
        ttft = round(timed_ms(lambda _: backend.prefill(0, ids, 0).tokens(), prefills, 1), 2)
    fed_steps = _FED_STEPS if kit.machine.is_card else _DRY_FED_STEPS
    fed = timed_ms(lambda i: backend.decode([5] * rows, [prompt + i] * rows).tokens(), fed_steps, _WARM)
    launched = launched_ms(backend, rows, prompt) if kit.machine.is_card else None
    step = launched or fed
    middle = prompt + (_LAUNCHED_STEPS if launched else fed_steps) // 2
    position_bytes = backend.kv_cache_bytes // (backend.max_batch * backend.max_seq)
    return {
        "rows": rows,
        "prompt": prompt,
        "ttft_ms": ttft,
        "fed_ms": round(fed, 3),
        "step_ms": round(step, 3),
        "tok_s": round(rows * 1e3 / step, 1),
        "step_bytes": weights + rows * middle * position_bytes,
    }


def launched_ms(backend: Any, rows: int, prompt: int) -> float:
    """Milliseconds a step with one more launched before the last one is waited for."""
    backend.decode([5] * rows, [prompt] * rows)
    backend.launch(rows)
    for _ in range(_WARM):
        backend.launch(rows)
        backend.tokens()
    begin = perf_counter()
    for _ in range(_LAUNCHED_STEPS):
        backend.launch(rows)
        backend.tokens()
    milliseconds = (perf_counter() - begin) / _LAUNCHED_STEPS * 1e3
    backend.tokens()
    return milliseconds


def timed_ms(work: Callable[[int], object], runs: int, warm: int) -> float:
    """The median of `runs` calls with their number, after `warm` that do not count."""
    times = []
    for number in range(warm + runs):
        begin = perf_counter()
        work(number)
        times.append(perf_counter() - begin)
    return median(times[warm:]) * 1e3


def chunks(kit: Kit, bundle: Bundle, setup: Setup) -> None:
    """A long prompt in one run (as above) and in smaller ones."""
    if not kit.machine.is_card:
        return
    ids = np.random.default_rng(1).integers(3, 30000, _CHUNKED_PROMPT)
    for chunk in _CHUNKS:
        with kit.results.guarded(label=setup.label, chunk=chunk):
            backend = open_backend(kit, bundle, setup, rows=1, positions=POSITIONS, chunk=chunk)
            try:
                ttft = timed_ms(lambda _, run=backend: run.prefill(0, ids, 0).tokens(), _PREFILLS, 1)  # type: ignore[misc]
                what = {"bundle": bundle.folder.name, "label": setup.label}
                kit.results.write(**what, prompt=_CHUNKED_PROMPT, chunk=chunk, ttft_ms=round(ttft, 2))
            finally:
                backend.close()
                gc.collect()

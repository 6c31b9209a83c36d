"""Open a bundle on a backend: by name, or on the best one that runs it here."""

from __future__ import annotations

from typing import Any, TypedDict

from starling.engine.backends.backend import CUDA, PREFILL_CHUNK, Backend
from starling.engine.backends.pooling_backend import PoolingBackend
from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import BackendError, PlanError, UserError, did_you_mean
from starling.engine.host import default_threads
from starling.engine.names import BACKENDS, GPU_BACKENDS


class CacheSizes(TypedDict):
    """Sizes that a backend is opened with."""

    max_seq: int
    max_batch: int
    prefill_chunk: int | None


class CpuUse(TypedDict):
    """How a backend on the CPU uses its cores, as of `open_backend`."""

    threads: int
    takes_turns: bool


def open_backend(
    bundle: Bundle,
    *,
    name: str = "auto",
    engine: str | None = None,
    max_seq: int,
    max_batch: int = 1,
    threads: int | None = None,
    prefill_chunk: int | None = None,
    takes_turns: bool = False,
) -> Backend:
    """Load `bundle` on the backend called `name`, one of BACKENDS.

    "auto" takes TensorRT for a bundle of that dialect where there are a GPU and a fitting engine; else, as
    "onnxruntime" does, CUDA where it is installed and can run the bundle, else the CPU. `engine` names the TensorRT
    engine to take. `threads` is for the CPU (default: physical cores of this process); `prefill_chunk` is how many
    tokens one run prefills at most (default: PREFILL_CHUNK on the CPU, 2,048 on CUDA, the engine's most on TensorRT).
    `takes_turns` says that another model runs between this one's runs: on the CPU its threads do not wait for
    their next run by spinning.

    Raises BackendError when the backend is unknown, not installed, or cannot run the bundle on this machine, PlanError
    where no engine fits, UserError for a size below 1, and for a bundle that generates no text.
    """
    bundle.require("generate")
    _check_name(name)
    given = {"max_seq": max_seq, "max_batch": max_batch, "threads": threads, "prefill_chunk": prefill_chunk}
    if any(size is not None and size < 1 for size in given.values()):
        raise UserError(f"{', '.join(f'{key}={size}' for key, size in given.items())}: each must be at least 1")
    sizes = CacheSizes(max_seq=max_seq, max_batch=max_batch, prefill_chunk=prefill_chunk)
    cpu = CpuUse(threads=threads or default_threads(), takes_turns=takes_turns)
    backend = _open(bundle, name, engine, cpu, sizes)
    if threads is not None and backend.provider != "CPUExecutionProvider":
        backend.note = f"threads={threads} changes nothing: they are the CPU's, and {backend.provider} runs the bundle"
    return backend


def open_pooling_backend(
    bundle: Bundle, *, name: str = "auto", max_seq: int, max_batch: int, threads: int | None = None
) -> PoolingBackend:
    """Load a bundle that scores or embeds, for texts of up to `max_seq` tokens, of which a run takes `max_batch`.

    Raises BackendError where `name` is no backend, or one on a GPU, where none of them runs such a bundle yet, and
    UserError for a size below 1 and for a bundle that generates text.
    """
    bundle.require("score", "embed")
    _check_name(name)
    if name in GPU_BACKENDS:
        raise BackendError(
            f"backend {name} does not run bundles that score or embed: use onnxruntime-cpu, which runs every dialect"
        )
    if max_seq < 1 or max_batch < 1 or (threads is not None and threads < 1):
        raise UserError(f"max_seq={max_seq}, max_batch={max_batch}, threads={threads}: each must be at least 1")
    from starling.engine.backends.onnxruntime.onnxruntime_backend import check_runs_on_cpu
    from starling.engine.backends.onnxruntime.ort_pooling import OrtPooling

    check_runs_on_cpu(bundle)
    return OrtPooling(bundle, threads=threads or default_threads(), max_seq=max_seq, max_batch=max_batch)


def _check_name(name: str) -> None:
    if name not in BACKENDS:
        raise BackendError(
            f"unknown backend {name!r}{did_you_mean(name, BACKENDS)}; choose one of {', '.join(BACKENDS)}"
        )


def _open(bundle: Bundle, name: str, engine: str | None, cpu: CpuUse, sizes: CacheSizes) -> Backend:
    if name.startswith("tensorrt"):
        return _open_tensorrt(bundle, name, engine, sizes)
    note = None
    if name == "auto" and bundle.dialect == "tensorrt":
        try:
            return _open_tensorrt(bundle, None, engine, sizes)
        except (BackendError, PlanError) as error:
            if engine is not None:
                raise
            note = f"ONNX Runtime runs the bundle's reference graph, since TensorRT cannot run here: {error}"
    elif engine is not None:
        raise UserError(_why_no_engine(bundle, name, engine))
    return _open_onnxruntime(bundle, name, cpu, note, sizes)


def _why_no_engine(bundle: Bundle, name: str, engine: str) -> str:
    what = f"engine {engine!r} is named, which {name} does not run"
    if bundle.dialect != "tensorrt":
        return f"{what} for a bundle of dialect {bundle.dialect}: leave it out, or export with --dialect tensorrt"
    return f"{what} here: use --backend tensorrt-rtx"


def _open_tensorrt(bundle: Bundle, runtime: str | None, engine: str | None, sizes: CacheSizes) -> Backend:
    from starling.engine.backends.tensorrt.run.open_tensorrt import (
        open_tensorrt,  # as below: only who uses it needs it installed
    )

    return open_tensorrt(bundle, runtime, engine=engine, **sizes)


def _open_onnxruntime(bundle: Bundle, name: str, cpu: CpuUse, note: str | None, sizes: CacheSizes) -> Backend:
    from starling.engine.backends.onnxruntime.cpu_session import import_onnxruntime
    from starling.engine.backends.onnxruntime.onnxruntime_backend import (
        OrtBackend,
        check_runs_on_cpu,
        why_not_on_cuda,
    )

    ort = import_onnxruntime()
    if name == "onnxruntime-cuda":
        if (reason := why_not_on_cuda(ort, bundle)) is not None:
            raise BackendError(reason)
        return _open_cuda(ort, bundle, sizes)
    if name != "onnxruntime-cpu" and CUDA in ort.get_available_providers():
        reason = why_not_on_cuda(ort, bundle)
        try:
            if reason is None:
                return _open_cuda(ort, bundle, sizes)
        except BackendError as error:
            reason = str(error)
        note = note or f"the CPU runs the bundle, since CUDA cannot run here: {reason}"
    check_runs_on_cpu(bundle)
    backend = OrtBackend(
        bundle,
        max_seq=sizes["max_seq"],
        max_batch=sizes["max_batch"],
        prefill_chunk=sizes["prefill_chunk"] or PREFILL_CHUNK,
        **cpu,
    )
    backend.note = note
    return backend


def _open_cuda(ort: Any, bundle: Bundle, sizes: CacheSizes) -> Backend:
    from starling.engine.backends.onnxruntime.onnxruntime_cuda import open_cuda

    return open_cuda(ort, bundle, **sizes)

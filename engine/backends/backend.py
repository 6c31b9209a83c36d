"""What the decode loop asks of an execution backend, and the registry that opens one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol, TypedDict

import numpy as np
import numpy.typing as npt

from starling.engine.backends.device_choice import DeviceChoice
from starling.engine.backends.logits import Logits
from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import BackendError, PlanError, UserError, did_you_mean
from starling.engine.names import BACKENDS

Tokens = npt.NDArray[np.int64]

CUDA = "CUDAExecutionProvider"
#: Tokens that one run prefills at most on the CPU. Attention's scratch memory is chunk x length x heads; SmolLM2
#: prefills 1024 tokens within 3 % as fast in chunks of 256 as of 512 (the best), and Ctrl-C waits for one chunk.
PREFILL_CHUNK = 256
#: Tokens of a row that `Backend.verify` takes at most: the newest one and a draft after it; and of all rows together.
MOST_VERIFIED = 17
MOST_VERIFIED_TOGETHER = 64


class Room(TypedDict):
    """Sizes that a backend is opened with."""

    max_seq: int
    max_batch: int
    prefill_chunk: int | None


class StepOutput(Protocol):
    """What one step of k rows left behind, valid until the backend's next call."""

    def next_tokens(self) -> list[int]:
        """The token chosen for each row where the logits are: the likeliest one, the lowest id of equals.

        Raises BackendError where the greatest logit of a row is not finite.
        """
        ...

    def choices(self) -> list[int]:
        """`next_tokens`, with -1 for a row whose greatest logit is not finite: it says nothing about the others."""
        ...

    def logits(self) -> Logits:
        """float32 [k, vocab] behind the last token of each row, a view of the backend's memory."""
        ...


class TokenPipeline(Protocol):
    """Steps of the first rows that are launched before the host has seen the tokens of the step before."""

    #: Whether the device draws tokens too, by a `DeviceChoice`. Otherwise it takes the likeliest, and only that.
    draws: bool

    def choose(self, row: int, choice: DeviceChoice, first: int) -> None:
        """From now on choose the row's tokens by `choice`; its first draw is for the step that writes `first`.

        Ends what was launched. `StepOutput.next_tokens` gives these choices as well.
        """
        ...

    def can_launch(self, rows: int) -> bool:
        """Whether a step of the first `rows` rows may be launched: few enough are under way, and it has room."""
        ...

    def launch(self, rows: int) -> None:
        """Launch a step of the first `rows` rows behind all others; each writes the token that it chose last."""
        ...

    def tokens(self) -> list[int]:
        """Wait for the oldest launched step whose tokens were not asked for; the token chosen in each of its rows.

        -1 stands for a row whose greatest logit is not finite.
        """
        ...


class Backend(Protocol):
    """A loaded model with a KV cache of `max_batch` rows of `max_seq` positions, allocated once.

    Not thread-safe: one thread at a time may call a backend.
    """

    name: str
    #: Execution provider in use, for example "CPUExecutionProvider".
    provider: str
    max_seq: int
    max_batch: int
    vocab_size: int
    #: Memory of the whole KV cache, in bytes.
    kv_cache_bytes: int
    #: Seconds spent inside the model's run since the backend was opened; the rest of a step is host time. Of a step
    #: that was launched ahead it is what `TokenPipeline.tokens` waited for.
    model_seconds: float
    #: Why it was not another backend that "auto" took; None where there is nothing to say.
    note: str | None
    #: Instruction set of the engine's own CPU kernels where they run the bundle ("avx512-vnni", "avx2"), else None.
    kernels: str | None
    #: Why they do not run a bundle that has a graph for them; None where there is nothing to say.
    kernels_note: str | None

    @property
    def pipeline(self) -> TokenPipeline | None:
        """Where tokens are chosen and fed on the device: how to run steps ahead of the host. None elsewhere."""
        ...

    def prefill(self, row: int, tokens: Tokens, start: int) -> StepOutput:
        """Write `tokens` int64 [n] at positions start..start+n of row `row`; the output is of that one row.

        `start` may lie behind a non-empty cache: positions before it are attended to, those after it are overwritten.
        """
        ...

    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> StepOutput:
        """One step of the first k rows: token i of `tokens` [k] is written at `positions`[i] of row i."""
        ...

    #: Rows that `verify` takes together: 0 where it is not to be had.
    verified_rows: int

    def check_verifies(self) -> None:
        """Raise BackendError, with the reason, where `verify` is not to be had."""
        ...

    def verify(self, first: int, tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> StepOutput:
        """Write k rows' `tokens` [k, n] at `starts`[i]..+n of row first + i, and choose a token after each of them.

        The output has k * n rows: row i * n + j is what follows tokens 0..j of row first + i. n is at most
        MOST_VERIFIED, k * n at most MOST_VERIFIED_TOGETHER, k at most `verified_rows`. Raises BackendError as
        `check_verifies` does, and for more than that.
        """
        ...

    def clear(self, row: int) -> None:
        """Forget what row `row` holds, so that numbers that are not finite cannot reach the next prompt there."""
        ...

    def close(self) -> None:
        """Free the model and the cache; the backend cannot be used afterwards."""
        ...


def default_threads() -> int:
    """Physical cores that this process may run on: hyper-threads share the units that a matrix product needs."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cpus = os.sched_getaffinity(0)
    return len({_siblings(cpu) for cpu in cpus}) or 1


def _siblings(cpu: int) -> str:
    try:
        with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return str(cpu)


def open_backend(
    bundle: Bundle,
    *,
    name: str = "auto",
    engine: str | None = None,
    max_seq: int,
    max_batch: int = 1,
    threads: int | None = None,
    prefill_chunk: int | None = None,
) -> Backend:
    """Load `bundle` on the backend called `name`, one of BACKENDS.

    "auto" takes TensorRT for a bundle of that dialect where there are a GPU and a fitting engine; else, as
    "onnxruntime" does, CUDA where it is installed and can run the bundle, else the CPU. `engine` names the TensorRT
    engine to take. `threads` is for the CPU (default: physical cores of this process); `prefill_chunk` is how many
    tokens one run prefills at most (default: PREFILL_CHUNK on the CPU, 2,048 on CUDA, the engine's most on TensorRT).

    Raises BackendError when the backend is unknown, not installed, or cannot run the bundle on this machine, PlanError
    where no engine fits, UserError for a size below 1.
    """
    if name not in BACKENDS:
        raise BackendError(
            f"unknown backend {name!r}{did_you_mean(name, BACKENDS)}; choose one of {', '.join(BACKENDS)}"
        )
    sizes = {"max_seq": max_seq, "max_batch": max_batch, "threads": threads, "prefill_chunk": prefill_chunk}
    if any(size is not None and size < 1 for size in sizes.values()):
        raise UserError(f"{', '.join(f'{key}={size}' for key, size in sizes.items())}: each must be at least 1")
    room = Room(max_seq=max_seq, max_batch=max_batch, prefill_chunk=prefill_chunk)
    backend = _open(bundle, name, engine, threads or default_threads(), room)
    if threads is not None and backend.provider != "CPUExecutionProvider":
        backend.note = f"threads={threads} changes nothing: they are the CPU's, and {backend.provider} runs the bundle"
    return backend


def _open(bundle: Bundle, name: str, engine: str | None, threads: int, room: Room) -> Backend:
    if name.startswith("tensorrt"):
        return _open_tensorrt(bundle, name, engine, room)
    note = None
    if name == "auto" and bundle.dialect == "tensorrt":
        try:
            return _open_tensorrt(bundle, None, engine, room)
        except (BackendError, PlanError) as error:
            if engine is not None:
                raise
            note = f"ONNX Runtime runs the bundle's reference graph, since TensorRT cannot run here: {error}"
    elif engine is not None:
        raise UserError(_why_no_engine(bundle, name, engine))
    return _open_onnxruntime(bundle, name, threads, note, room)


def _why_no_engine(bundle: Bundle, name: str, engine: str) -> str:
    what = f"engine {engine!r} is named, which {name} does not run"
    if bundle.dialect != "tensorrt":
        return f"{what} for a bundle of dialect {bundle.dialect}: leave it out, or export with --dialect tensorrt"
    return f"{what} here: use --backend tensorrt-rtx"


def _open_tensorrt(bundle: Bundle, runtime: str | None, engine: str | None, room: Room) -> Backend:
    from starling.engine.backends.tensorrt.run.open_tensorrt import (
        open_tensorrt,  # as below: only who uses it needs it installed
    )

    return open_tensorrt(bundle, runtime, engine=engine, **room)


def _open_onnxruntime(bundle: Bundle, name: str, threads: int, note: str | None, room: Room) -> Backend:
    from starling.engine.backends.onnxruntime.onnxruntime_backend import (
        OrtBackend,
        check_runs_on_cpu,
        import_onnxruntime,
        why_not_on_cuda,
    )

    ort = import_onnxruntime()
    if name == "onnxruntime-cuda":
        if (reason := why_not_on_cuda(ort, bundle)) is not None:
            raise BackendError(reason)
        return _open_cuda(ort, bundle, room)
    if name != "onnxruntime-cpu" and CUDA in ort.get_available_providers():
        reason = why_not_on_cuda(ort, bundle)
        try:
            if reason is None:
                return _open_cuda(ort, bundle, room)
        except BackendError as error:
            reason = str(error)
        note = note or f"the CPU runs the bundle, since CUDA cannot run here: {reason}"
    check_runs_on_cpu(bundle)
    backend = OrtBackend(
        bundle,
        threads=threads,
        max_seq=room["max_seq"],
        max_batch=room["max_batch"],
        prefill_chunk=room["prefill_chunk"] or PREFILL_CHUNK,
    )
    backend.note = note
    return backend


def _open_cuda(ort: Any, bundle: Bundle, room: Room) -> Backend:
    from starling.engine.backends.onnxruntime.onnxruntime_cuda import open_cuda

    return open_cuda(ort, bundle, **room)


def chunk_length(remaining: int, most: int) -> int:
    """Tokens of the next chunk of a prompt with `remaining` left: at most `most`, and not so many that one is left.

    One token alone takes a decode step's kernels, which round differently: how a prompt is cut would then show in its
    logits (measured on ONNX Runtime: otherwise they are the same bits).
    """
    return most - 1 if remaining == most + 1 and most > 2 else min(remaining, most)


def check_room(backend: Backend, row: int, position: int) -> None:
    """Raise BackendError where the backend's cache has no such position of such a row."""
    if position >= backend.max_seq or not 0 <= row < backend.max_batch:
        raise BackendError(
            f"position {position} of row {row} lies outside the KV cache "
            f"({backend.max_batch} rows of {backend.max_seq} positions); open the engine with more"
        )

"""What the decode loop asks of an execution backend, and the registry that opens one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from starling.engine.bundle import Bundle
from starling.engine.errors import BackendError, UserError
from starling.engine.logits import Logits

Tokens = npt.NDArray[np.int64]

BACKENDS = ("auto", "onnxruntime", "onnxruntime-cpu", "onnxruntime-cuda")
#: Tokens that one call of the graph prefills at most. Attention's scratch memory is chunk x length x heads; SmolLM2
#: prefills 1024 tokens within 3 % as fast in chunks of 256 as of 512 (the best), and Ctrl-C waits for one chunk.
PREFILL_CHUNK = 256


class StepOutput(Protocol):
    """What one step of k rows left behind, valid until the backend's next call."""

    def next_tokens(self) -> list[int]:
        """The token chosen for each row where the logits are: the likeliest one, the lowest id of equals.

        Raises BackendError where the greatest logit of a row is not finite.
        """
        ...

    def logits(self) -> Logits:
        """float32 [k, vocab] behind the last token of each row, a view of the backend's memory."""
        ...


class Backend(Protocol):
    """A loaded model with a KV cache of `max_batch` rows (slots) of `max_seq` positions, allocated once.

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
    #: Seconds spent inside the model's run since the backend was opened; the rest of a step is host time.
    model_seconds: float

    def prefill(self, slot: int, tokens: Tokens, start: int) -> StepOutput:
        """Write `tokens` int64 [n] at positions start..start+n of row `slot`; the output is of that one row.

        `start` may lie behind a non-empty cache: positions before it are attended to, those after it are overwritten.
        """
        ...

    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> StepOutput:
        """One step of the first k rows: token i of `tokens` [k] is written at `positions`[i] of row i."""
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
    max_seq: int,
    max_batch: int = 1,
    threads: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Backend:
    """Load `bundle` on the backend called `name`, one of BACKENDS.

    "auto" and "onnxruntime" take CUDA where it is installed and can run the bundle, else the CPU. `threads` is for the
    CPU (default: physical cores of this process). Raises BackendError when the backend is unknown, not installed, or
    cannot run the bundle on this machine, UserError for a size below 1.
    """
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")
    if max_seq < 1 or max_batch < 1 or prefill_chunk < 1 or (threads is not None and threads < 1):
        raise UserError(
            f"max_seq={max_seq}, max_batch={max_batch}, threads={threads}, prefill_chunk={prefill_chunk}: "
            "each must be at least 1"
        )
    # Imported here so that `import starling.engine` needs no onnxruntime.
    from starling.engine.ort_backend import OrtBackend, choose_provider

    return OrtBackend(
        bundle,
        provider=choose_provider(bundle, name),
        max_seq=max_seq,
        max_batch=max_batch,
        threads=threads or default_threads(),
        prefill_chunk=prefill_chunk,
    )

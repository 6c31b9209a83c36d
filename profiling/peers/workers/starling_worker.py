"""Starling's own engine as a worker, through the Python API that everybody uses."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from starling.engine.backends.backend import Backend
from starling.engine.engine import Engine
from starling.engine.generation.sampling_params import SamplingParams

if TYPE_CHECKING:  # a peer's environment lacks our package
    from starling.profiling.peers.workers.worker import Arrived, Feed, Setup

#: A GPU that happens to be there must not answer for the CPU.
BACKENDS = {"cpu": "onnxruntime-cpu", "cuda": "auto"}


class Worker:
    """A bundle, run greedily by the engine."""

    def __init__(self) -> None:
        self._opened: Engine | None = None

    def open(self, setup: Setup) -> dict[str, str]:
        backend = setup.settings.get("backend", BACKENDS[setup.device])
        self._opened = Engine(setup.model, backend=backend, max_seq=setup.capacity, threads=setup.threads)
        return {name: version(name) for name in ("starling-llm", "onnxruntime", "numpy")}

    def start(self, prompt: list[int], new_tokens: int) -> Callable[[Arrived], None]:
        chunks = self._engine.stream(prompt, SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True))

        def generate(arrived: Arrived) -> None:
            for chunk in chunks:
                if chunk.token is not None:
                    arrived(chunk.token)

        return generate

    def begin(self) -> Feed:
        return _feed(self._engine.backend)

    @property
    def _engine(self) -> Engine:
        if self._opened is None:
            raise RuntimeError("run before open")
        return self._opened


def _feed(backend: Backend) -> Feed:
    written = 0

    def feed(tokens: list[int]) -> npt.NDArray[np.float32]:
        nonlocal written
        first = written == 0
        at, written = written, written + len(tokens)
        step = backend.prefill(0, np.array(tokens, np.int64), 0) if first else backend.decode(tokens, [at])
        logits: npt.NDArray[np.float32] = step.logits()[0].copy()
        return logits

    return feed

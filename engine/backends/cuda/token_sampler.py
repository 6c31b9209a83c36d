"""Tokens drawn on a GPU by a kernel of the engine's own, after the run that has made the logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from starling.engine.backends.backend import DeviceChoice
from starling.engine.backends.cuda.cuda_device import Device, address_of
from starling.engine.backends.cuda.device_memory import DeviceMemory
from starling.engine.backends.cuda.row_choices import RowChoices
from starling.engine.backends.cuda.step_tensors import RowTensors
from starling.engine.errors import BackendError
from starling.engine.kernels.cuda import reference
from starling.engine.kernels.cuda.compiler import cached_cubin
from starling.engine.kernels.cuda.driver import Kernel
from starling.engine.kernels.cuda.variants import Sampling, SamplingArguments
from starling.engine.names import MIN_P, NOISE, TEMPERATURE, TOP_K, TOP_P

_SETTINGS = {TEMPERATURE: 4, TOP_K: 8, TOP_P: 4, MIN_P: 4}
_CHECKED_VOCABULARY, _CHECKED_POSITIONS = 4096, 2
#: Each with top_k, top_p and min_p of its own.
_CHECKED = [
    DeviceChoice(0.8, 0, 0.9, 1),
    DeviceChoice(1.3, 0, 1.0, 2),
    DeviceChoice(1.0, 40, 0.95, 3),
    DeviceChoice(0.7, 0, 1.0, 4, 0.05),
    DeviceChoice(0.5, 1),
]


class SamplingKernel(Protocol):
    """A kernel that is compiled, as `starling.engine.kernels.cuda.driver.Kernel`."""

    def launch(
        self, grid: tuple[int, int, int], threads: int, arguments: SamplingArguments, stream: int, *, early: bool
    ) -> None: ...

    def close(self) -> None: ...


def sampling_kernel(device: Device, dtype: str, cache: Path) -> Kernel:
    """sampling.cu for logits of `dtype`, compiled for the card. Raises CompilationError, DriverError or OSError."""
    variant = Sampling(dtype == "bfloat16")
    code = cached_cubin("sampling.cu", variant.defines(), f"sm_{device.target.removeprefix('sm')}", cache)
    return Kernel(code, "sample", variant.shared_bytes)


class TokenSampler:
    """The rows' settings in device memory, and the kernel that reads them."""

    def __init__(
        self, kernel: SamplingKernel, memory: DeviceMemory, *, rows: int, positions: int, vocab_size: int
    ) -> None:
        self._kernel, self._memory, self._positions, self._vocab_size = kernel, memory, positions, vocab_size
        self._tensors = RowTensors(memory, {**_SETTINGS, NOISE: 4 * positions}, rows)
        self._choices = RowChoices(memory, self._tensors, rows, positions)
        self._draws = [False] * rows

    def draws(self, first: int, rows: int = 1) -> bool:
        """Whether one of `rows` rows from `first` on takes something else than the likeliest token."""
        return True in self._draws[first : first + rows]

    def write(self, row: int, choice: DeviceChoice, first: int) -> None:
        """Choose the row's tokens by `choice` from now on, as `RowChoices.write`. The stream must be idle."""
        draws = choice.top_k != 1
        if draws or self._draws[row]:
            self._choices.write(row, choice, first)
        self._draws[row] = draws

    def enqueue(self, logits: int, lengths: int, tokens: int, *, rows: int, kept: int = 1, first: int = 0) -> None:
        """Choose int64 [rows, kept] at `tokens` for `logits` [rows, kept, vocab] of the rows from `first` on.

        `lengths` int32 [rows]: positions that are written of each row, the last after `kept` more than the first.
        """
        settings = [self._tensors.row(name, first) for name in (*_SETTINGS, NOISE)]
        arguments = SamplingArguments(logits, *settings, lengths, tokens, self._vocab_size, self._positions)
        threads = Sampling(bfloat16=False).threads
        self._kernel.launch((rows, kept, 1), threads, arguments, self._memory.stream, early=False)


def check_sampling(kernel: SamplingKernel, device: Device, dtype: str) -> None:
    """Raise BackendError unless the kernel chooses on this card what NumPy does, for a few rows."""
    memory = DeviceMemory(device)
    try:
        logits, rows = _checked_logits(dtype), len(_CHECKED)
        sampler = TokenSampler(kernel, memory, rows=rows, positions=_CHECKED_POSITIONS, vocab_size=_CHECKED_VOCABULARY)
        for row, choice in enumerate(_CHECKED):
            sampler.write(row, choice, 0)
        raw, lengths, tokens = (
            memory.host((rows, size), kind)
            for size, kind in ((_CHECKED_VOCABULARY, "uint16"), (1, "int32"), (1, "int64"))
        )
        raw[:], lengths[:] = logits[0], 1
        places = [memory.allocate(array.nbytes) for array in (raw, lengths, tokens)]
        for place, array in zip(places, (raw, lengths), strict=False):
            memory.copy(place, address_of(array), array.nbytes)
        sampler.enqueue(*places, rows=rows)
        memory.copy(address_of(tokens), places[2], tokens.nbytes)
        memory.synchronize()
        wanted = reference.sampled(logits[1], _as_draws()).tolist()
        if tokens[:, 0].tolist() != wanted:
            raise BackendError(f"the kernel that draws tokens chose {tokens[:, 0].tolist()}, not {wanted}")
    finally:
        memory.close()


def _checked_logits(dtype: str) -> tuple[Any, Any]:
    """Bits and values of logits [rows, vocabulary]."""
    values = np.random.default_rng(0).normal(0, 3, (len(_CHECKED), _CHECKED_VOCABULARY)).astype(np.float32)
    if dtype == "bfloat16":
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        return bits, (bits.astype(np.uint32) << 16).view(np.float32)
    halves = values.astype(np.float16)
    return halves.view(np.uint16), halves


def _as_draws() -> reference.Draws:
    columns = [(c.temperature, c.top_k, c.top_p, c.min_p, c.noise(1)[0]) for c in _CHECKED]
    return reference.Draws(*map(np.array, zip(*columns, strict=True)))

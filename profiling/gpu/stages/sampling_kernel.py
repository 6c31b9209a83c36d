"""Tokens drawn on the card: right against NumPy, microseconds of the kernel, and what a step that draws takes."""

from __future__ import annotations

import ctypes
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from starling.engine.backends.backend import GREEDY, DeviceChoice
from starling.engine.bundle.manifest import Bundle
from starling.engine.kernels.cuda import reference
from starling.engine.kernels.cuda.compiler import emulated
from starling.engine.kernels.cuda.variants import Sampling, SamplingArguments
from starling.profiling.gpu.stages.kit import Kit
from starling.profiling.gpu.stages.throughput import OURS, POSITIONS, RUNTIMES, launched_ms, open_backend

#: What is asked: temperature, top_k, top_p, min_p.
WAYS = {
    "likeliest": (1.0, 1, 1.0, 0.0),
    "temperature": (0.8, 0, 1.0, 0.0),
    "top_p": (0.8, 0, 0.9, 0.0),
    "top_k": (0.8, 40, 1.0, 0.0),
    "top_k and top_p": (1.2, 200, 0.9, 0.0),
    "min_p": (1.0, 0, 1.0, 0.05),
}
#: Some draws fall so close to a token's bound that float32 and NumPy's float64 differ.
_LEAST_RIGHT = 0.99
_DRAWS, _DRY_DRAWS = 256, 16
_VOCABULARIES, _DRY_VOCABULARIES = (32002, 151936), (2000,)
_ROWS, _LAUNCHES, _WARM = (1, 4, 16), 100, 10
_PROMPT = 128


class _Runner(Protocol):
    """Where the kernel runs; `place` gives an array's address there, `arrays` are on the host."""

    def place(self, array: npt.NDArray[Any]) -> int: ...

    def launch(self, arguments: SamplingArguments, rows: int) -> None: ...

    def fetch(self, address: int, count: int) -> npt.NDArray[np.int64]: ...

    def close(self) -> None: ...


class _Emulation:
    def __init__(self, dtype: str) -> None:
        self._library = emulated("sampling.cu", Sampling(dtype == "bfloat16", threads=128).defines())
        self._kept: list[npt.NDArray[Any]] = []

    def place(self, array: npt.NDArray[Any]) -> int:
        self._kept.append(array.copy())
        return int(self._kept[-1].ctypes.data)

    def launch(self, arguments: SamplingArguments, rows: int) -> None:
        self._library.emulate_sample(ctypes.byref(arguments), rows, 1)

    def fetch(self, address: int, count: int) -> npt.NDArray[np.int64]:
        return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_int64)), (count,)).copy()

    def close(self) -> None:
        self._kept.clear()


class _Card:
    def __init__(self, dtype: str) -> None:
        from starling.engine.backends.cuda.cuda_device import CudaDevice
        from starling.engine.backends.cuda.cuda_runtime import CudaRuntime
        from starling.engine.backends.cuda.device_memory import DeviceMemory
        from starling.engine.backends.cuda.token_sampler import sampling_kernel
        from starling.engine.host import cache_folder

        device = CudaDevice(CudaRuntime())
        self._memory = DeviceMemory(device)
        self.kernel = sampling_kernel(device, dtype, cache_folder() / "kernels")

    def place(self, array: npt.NDArray[Any]) -> int:
        host = self._memory.host(array.shape, array.dtype)
        host[...] = array
        address = self._memory.allocate(array.nbytes)
        self._memory.copy(address, host.ctypes.data, array.nbytes)
        return address

    def launch(self, arguments: SamplingArguments, rows: int) -> None:
        threads = Sampling(bfloat16=False).threads
        self.kernel.launch((rows, 1, 1), threads, arguments, self._memory.stream, early=False)

    def wait(self) -> None:
        self._memory.synchronize()

    def fetch(self, address: int, count: int) -> npt.NDArray[np.int64]:
        host = self._memory.host((count,), "int64")
        self._memory.copy(host.ctypes.data, address, host.nbytes)
        self.wait()
        return host.copy()

    def close(self) -> None:
        self.kernel.close()
        self._memory.close()


class _Asked(NamedTuple):
    arguments: SamplingArguments
    tokens: int
    #: As NumPy draws them.
    wanted: npt.NDArray[np.int64]


def run(kit: Kit) -> None:
    """The kernel against NumPy and its time; then steps of the 7B shape, greedy and drawn in turn."""
    for dtype in ("float16", "bfloat16"):
        with kit.results.guarded(what="the kernel", dtype=dtype):
            _check(kit, dtype)
    if kit.machine.is_card:
        with kit.results.guarded(what="the kernel's time"):
            _time(kit)
        for precision, setup in (("fp16", RUNTIMES), ("int8-fp16", OURS)):
            with kit.results.guarded(what="steps", precision=precision):
                _steps(kit, Bundle.open(kit.work / kit.large(precision)), setup)


def _asked(runner: _Runner, dtype: str, vocabulary: int, rows: int, way: str) -> _Asked:
    random = np.random.default_rng(vocabulary + rows)
    values = random.normal(0, 3, (rows, vocabulary)).astype(np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else values.astype(np.float16)
    exact = (bits.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else bits
    columns = (*WAYS[way], random.random(rows))
    draws = reference.Draws(
        *(np.full(rows, column, t) for column, t in zip(columns, ("f4", "i8", "f4", "f4", "f4"), strict=True))
    )
    placed = [runner.place(array) for array in (bits, *draws, np.ones(rows, np.int32))]
    tokens = runner.place(np.full(rows, -7, np.int64))
    arguments = SamplingArguments(*placed, tokens, vocabulary, 1)
    return _Asked(arguments, tokens, reference.sampled(exact, draws))


def _check(kit: Kit, dtype: str) -> None:
    runner: _Runner = _Card(dtype) if kit.machine.is_card else _Emulation(dtype)
    rows = _DRAWS if kit.machine.is_card else _DRY_DRAWS
    try:
        for vocabulary in _VOCABULARIES[:1] if kit.machine.is_card else _DRY_VOCABULARIES:
            for way in WAYS:
                asked = _asked(runner, dtype, vocabulary, rows, way)
                runner.launch(asked.arguments, rows)
                right = float((runner.fetch(asked.tokens, rows) == asked.wanted).mean())
                kit.results.write(dtype=dtype, vocabulary=vocabulary, way=way, right=right, ok=right >= _LEAST_RIGHT)
    finally:
        runner.close()


def _time(kit: Kit) -> None:
    """Microseconds a launch, of launches one after another."""
    card = _Card("float16")
    try:
        kit.results.write(registers_and_spills=card.kernel.registers())
        for vocabulary in _VOCABULARIES:
            for rows in _ROWS:
                for way in WAYS:
                    asked = _asked(card, "float16", vocabulary, rows, way)
                    for number in range(_WARM + _LAUNCHES):
                        if number == _WARM:
                            card.wait()
                            begin = perf_counter()
                        card.launch(asked.arguments, rows)
                    card.wait()
                    us = (perf_counter() - begin) / _LAUNCHES * 1e6
                    kit.results.write(vocabulary=vocabulary, rows=rows, way=way, us=round(us, 1))
    finally:
        card.close()


def _steps(kit: Kit, bundle: Bundle, setup: Any) -> None:
    """Milliseconds of launched steps by the way in which all rows choose; None where the host must draw."""
    choices = {
        way: DeviceChoice(temperature, top_k, top_p, 1, min_p)
        for way, (temperature, top_k, top_p, min_p) in WAYS.items()
    }
    for rows in _ROWS:
        backend = open_backend(kit, bundle, setup, rows=rows, positions=POSITIONS)
        try:
            ids = np.random.default_rng(1).integers(3, 30000, _PROMPT)
            times = {}
            for way, choice in choices.items():
                can = backend.can_choose(choice)
                for row in range(rows):
                    backend.choose(row, choice if can else GREEDY, _PROMPT - 1)
                    backend.prefill(row, ids, 0)
                times[way] = round(launched_ms(backend, rows, _PROMPT), 3) if can else None
            note = backend.note or backend.kernels_note
            kit.results.write(bundle=bundle.folder.name, label=setup.label, rows=rows, step_ms_by_way=times, note=note)
        finally:
            backend.close()
            del backend

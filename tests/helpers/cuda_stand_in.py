"""ONNX Runtime's CPU provider in the place of its CUDA provider: runs wait on a stream, steps are captured as there."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import onnxruntime
from host_device import HostDevice

from starling.engine.backends.onnxruntime.onnxruntime_cuda import OrtCudaBackend
from starling.engine.bundle.manifest import Bundle
from starling.engine.kernels.cuda.compiler import emulated
from starling.engine.kernels.cuda.variants import Sampling, SamplingArguments

RUNS_TO_CAPTURE = 3
TOTAL = "total_sequence_length"


class _Binding:
    """An IOBinding that can be changed while runs that were launched with it wait."""

    def __init__(self) -> None:
        self.inputs: dict[str, tuple[Any, ...]] = {}
        self.outputs: dict[str, tuple[Any, ...]] = {}

    def bind_input(self, name: str, device: str, *rest: Any) -> None:
        assert device == ("cpu" if name == TOTAL else "cuda")
        self.inputs[name] = rest

    def bind_output(self, name: str, device: str, *rest: Any) -> None:
        assert device == "cuda"
        self.outputs[name] = rest


class _Session:
    """A session whose runs the device does later, each with the lengths on the host as they were at its launch.

    A run with a graph's name runs three times at first, and from then on with the lengths that it had then.
    """

    def __init__(self, path: str, device: HostDevice, stream: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._real: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._device, self._stream = device, stream
        self._captured: dict[str, int] = {}
        self.runs: list[str] = []

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider"]

    def io_binding(self) -> _Binding:
        return _Binding()

    def run_with_iobinding(self, binding: _Binding, options: dict[str, str]) -> None:
        graph = options["gpu_graph_id"]
        assert options["disable_synchronize_execution_providers"] == "1"
        total = ctypes.c_int32.from_address(binding.inputs[TOTAL][-1]).value
        times = 1
        if graph != "-1":
            if graph not in self._captured:
                self._captured[graph], times = total, RUNS_TO_CAPTURE
            total = self._captured[graph]
        self.runs += [graph] * times
        for _ in range(times):
            self._device.put(self._stream, self._work(binding, total))

    def _work(self, binding: _Binding, total: int) -> Callable[[], None]:
        real, length = self._real.io_binding(), ctypes.c_int32(total)
        for name, rest in binding.inputs.items():
            pointer = ctypes.addressof(length) if name == TOTAL else rest[-1]
            real.bind_input(name, "cpu", *rest[:-1], pointer)
        for name, rest in binding.outputs.items():
            real.bind_output(name, "cpu", *rest)

        def run() -> None:
            assert length.value == total  # keeps it alive
            self._real.run_with_iobinding(real)

        return run


class EmulatedSampling:
    """sampling.cu compiled for the CPU, whose launches wait on the device's stream."""

    def __init__(self, device: HostDevice, *, bfloat16: bool = False) -> None:
        self._library, self._device = emulated("sampling.cu", Sampling(bfloat16, threads=128).defines()), device

    def launch(
        self, grid: tuple[int, int, int], threads: int, arguments: SamplingArguments, stream: int, *, early: bool
    ) -> None:
        # By value, as a kernel's arguments are.
        given = SamplingArguments.from_buffer_copy(arguments)
        self._device.put(stream, lambda: self._library.emulate_sample(ctypes.byref(given), *grid[:2]))

    def close(self) -> None:
        """Nothing to unload."""


def cuda_backend(
    bundle: Bundle, device: HostDevice, *, refuses: Exception | None = None, samples: bool = False, **room: int
) -> OrtCudaBackend:
    """The backend for CUDA on the stand-ins; with `refuses` no step can be captured, with `samples` it draws tokens."""

    class Refusing(_Session):
        def run_with_iobinding(self, binding: _Binding, options: dict[str, str]) -> None:
            if options["gpu_graph_id"] != "-1" and refuses is not None:
                raise refuses
            super().run_with_iobinding(binding, options)

    def open_session(path: str, options: Any, providers: list[tuple[str, dict[str, str]]]) -> _Session:
        ((name, settings),) = providers
        assert name == "CUDAExecutionProvider"
        return Refusing(path, device, int(settings["user_compute_stream"]))

    class RunOptions(dict[str, str]):
        def add_run_config_entry(self, key: str, value: str) -> None:
            self[key] = value

    ort = SimpleNamespace(
        InferenceSession=open_session, RunOptions=RunOptions, SessionOptions=onnxruntime.SessionOptions
    )
    sampling = EmulatedSampling(device) if samples else None
    return OrtCudaBackend(ort, bundle, device, sampling=sampling, **room)

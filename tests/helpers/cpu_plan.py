"""TensorRT's runtime for plans, stood in for by ONNX Runtime's CPU provider and the bundle's own reference graph.

The classes have the methods of tensorrt_rtx that the backend calls, with its manners: False for what is refused, None
where a plan does not load.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import onnxruntime  # type: ignore[import-untyped]
import pytest
from host_device import HostDevice

from starling.engine.backends.cuda.cuda_device import ALIGNMENT, host_view
from starling.engine.backends.tensorrt.build.graph_edits import drop_draws
from starling.engine.backends.tensorrt.plan_record import BundleDigests, EngineRecord, Profile, ShapeRange
from starling.engine.backends.tensorrt.run import open_tensorrt as opening
from starling.engine.backends.tensorrt.run.select_engine import Wanted
from starling.engine.backends.tensorrt.run.tensorrt_backend import TensorRTBackend
from starling.engine.backends.tensorrt.runtimes import Library
from starling.engine.bundle.file_records import FileRecord
from starling.engine.bundle.manifest import Bundle
from starling.engine.names import TEMPERATURE, TOP_K, TOP_P
from starling.engine.onnx_bytes import read_nodes

tensorrt_rtx = pytest.importorskip("tensorrt_rtx")
NUMPY_TYPES = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(float16)": np.float16}
SCRATCH_BYTES = 4096
PLAN = bytes(64)
VERSION = "1.7.1.116"
#: The engine that the stand-in is: its cache, and its longest prefill.
POSITIONS, ROWS, CHUNK = 64, 4, 8


def cpu_library(engine: CpuEngine | None, version: str) -> Library:
    """A library whose runtime loads `engine` in place of any plan; None: it refuses every plan."""
    messages: deque[str] = deque()

    def runtime(logger: Any) -> CpuRuntime:
        return CpuRuntime(engine, messages)

    module = SimpleNamespace(
        Runtime=runtime,
        ExecutionContextAllocationStrategy=tensorrt_rtx.ExecutionContextAllocationStrategy,
        DynamicShapesKernelSpecializationStrategy=tensorrt_rtx.DynamicShapesKernelSpecializationStrategy,
        CudaGraphStrategy=tensorrt_rtx.CudaGraphStrategy,
        IExecutionContext=tensorrt_rtx.IExecutionContext,
        IProfiler=tensorrt_rtx.IProfiler,
    )
    return Library("tensorrt-rtx", version, module, None, messages)


@dataclass
class CpuRuntime:
    engine: CpuEngine | None
    messages: deque[str]

    def deserialize_cuda_engine(self, serialized_engine: Any) -> CpuEngine | None:
        if self.engine is None:
            self.messages.append("Error Code 1: Serialization")
        return self.engine


class CpuRuntimeCache:
    def __init__(self) -> None:
        self.kernels = b""

    def deserialize(self, blob: bytes) -> bool:
        self.kernels = blob
        return blob.startswith(b"kernels")

    def serialize(self) -> bytes:
        return b"kernels of this machine"


@dataclass
class CpuRuntimeConfig:
    dynamic_shapes_kernel_specialization_strategy: Any = None
    cuda_graph_strategy: Any = None
    strategy: Any = None
    cache: CpuRuntimeCache | None = None

    def create_runtime_cache(self) -> CpuRuntimeCache:
        return CpuRuntimeCache()

    def set_runtime_cache(self, cache: CpuRuntimeCache) -> bool:
        self.cache = cache
        return True

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy


class CpuEngine:
    """Runs `graph` in the way that the engine of `record` would, in layers of these names."""

    def __init__(self, device: HostDevice, record: EngineRecord, graph: Path, layers: Sequence[str]) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        self.device, self.record, self.layers, self.capturable = device, record, layers, True
        self.num_optimization_profiles = len(record.profiles)
        self.contexts: list[CpuContext] = []

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return SCRATCH_BYTES

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return dict((present, past) for past, present in self.record.aliases).get(name)

    def create_runtime_config(self) -> CpuRuntimeConfig:
        return CpuRuntimeConfig()

    def create_execution_context(self, runtime_config: CpuRuntimeConfig) -> CpuContext:
        self.contexts.append(CpuContext(self, runtime_config))
        return self.contexts[-1]


@dataclass
class CpuContext:
    engine: CpuEngine
    config: CpuRuntimeConfig
    profile: int = -1
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)
    memory: tuple[int, int] = (0, 0)
    profiler: Any = None
    enqueue_emits_profile: bool = True
    #: Name and milliseconds of each layer of a run that was not reported yet.
    timed: list[tuple[str, float]] = field(default_factory=list)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self.profile = profile_index
        return 0 <= profile_index < self.engine.num_optimization_profiles

    def set_device_memory(self, memory: int, size: int) -> None:
        self.memory = (memory, size)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        allowed = self.engine.record.profiles[self.profile].shapes[name]
        self.shapes[name] = shape
        return len(shape) == len(allowed.min) and all(
            least <= size <= most for least, size, most in zip(allowed.min, shape, allowed.max, strict=True)
        )

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return memory % ALIGNMENT == 0

    def infer_shapes(self) -> list[str]:
        return [tensor.name for tensor in self.engine.session.get_inputs() if tensor.name not in self.shapes]

    def is_stream_capturable(self, stream: int) -> bool:
        return self.engine.capturable

    def execute_async_v3(self, stream_handle: int) -> bool:
        shapes, addresses = dict(self.shapes), dict(self.addresses)  # a run uses what was set when it was enqueued
        for past, present in self.engine.record.aliases:
            assert addresses[past] == addresses[present], f"{present} must lie where {past} does"
        assert self.memory[1] >= SCRATCH_BYTES
        self.engine.device.put(stream_handle, lambda: self._run(shapes, addresses))
        if self.profiler is not None and self.enqueue_emits_profile:
            self.engine.device.synchronize(stream_handle)
            self.report_to_profiler()
        return True

    def report_to_profiler(self) -> bool:
        if self.profiler is None:
            return False
        for name, ms in self.timed:
            self.profiler.report_layer_time(name, ms)
        self.timed = []
        return True

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        session, begin = self.engine.session, perf_counter()
        feeds = {
            tensor.name: host_view(addresses[tensor.name], shapes[tensor.name], NUMPY_TYPES[tensor.type])
            for tensor in session.get_inputs()
        }
        names = [tensor.name for tensor in session.get_outputs()]
        for name, value in zip(names, session.run(names, feeds), strict=True):
            host_view(addresses[name], value.shape, value.dtype)[...] = value
        if self.profiler is not None:  # the events of one run only: those of a run before it are lost
            ms, profile = (perf_counter() - begin) * 1e3, f" [profile {self.profile}]" if self.profile else ""
            self.timed = [(f"{layer}{profile}", ms / len(self.engine.layers)) for layer in self.engine.layers]


def _profile(bundle: Bundle, name: str, most_tokens: int) -> Profile:
    def shape(spec: tuple[int | str, ...], batch: int, sequence: int) -> tuple[int, ...]:
        sizes = {"batch": batch, "sequence": sequence, "cache": POSITIONS}
        return tuple(sizes[size] if isinstance(size, str) else size for size in spec)

    ranges = {
        tensor.name: ShapeRange(
            shape(tensor.shape, 1, 1), shape(tensor.shape, 1, most_tokens), shape(tensor.shape, ROWS, most_tokens)
        )
        for tensor in bundle.graph.inputs
    }
    return Profile(name, ranges)


def record_of(bundle: Bundle, *, greedy: bool = False) -> EngineRecord:
    """An engine of ROWS rows and POSITIONS positions, prefill in chunks of CHUNK; its plan is 64 bytes of nothing."""
    folder = bundle.folder / "engines"
    folder.mkdir(exist_ok=True)
    (folder / "small.plan").write_bytes(PLAN)
    names = [tensor.name for tensor in bundle.graph.inputs if tensor.name.startswith("past_key_values.")]
    inputs = tuple(
        tensor for tensor in bundle.graph.inputs if not (greedy and tensor.name in (TEMPERATURE, TOP_K, TOP_P))
    )
    return EngineRecord(
        folder=folder,
        name="small",
        runtime="tensorrt-rtx",
        runtime_version=VERSION,
        targets=("sm89",),
        dtype="fp32",
        quantization=None,
        max_batch=ROWS,
        max_prefill=CHUNK,
        max_seq=POSITIONS,
        profiles=(_profile(bundle, "prefill", CHUNK), _profile(bundle, "decode", 1)),
        inputs=inputs,
        outputs=bundle.graph.outputs,
        aliases=tuple((name, name.replace("past_key_values.", "present.")) for name in names),
        layers={},
        build_seconds=0.0,
        built_from=BundleDigests.of(bundle),
        plan=FileRecord(len(PLAN), hashlib.sha256(PLAN).hexdigest()),
        created="",
    )


class Opened(NamedTuple):
    """A backend on stand-ins for the GPU and the plan."""

    backend: TensorRTBackend
    device: HostDevice
    engine: CpuEngine


def cpu_engine(bundle: Bundle, device: HostDevice, *, greedy: bool = False) -> CpuEngine:
    """With a layer for each node of the bundle's graph that computes anything; `greedy`: of a plan that draws none."""
    layers = [node.name for node in read_nodes(bundle.graph_path) if node.operator != "Constant"]
    graph = bundle.folder / "model_reference.onnx"
    if greedy:
        edited = drop_draws(graph.read_bytes())
        graph = graph.with_name("model_reference_greedy.onnx")
        graph.write_bytes(edited)
    return CpuEngine(device, record_of(bundle, greedy=greedy), graph, layers)


def stand_in(patch: pytest.MonkeyPatch, engine: CpuEngine) -> None:
    """From now on whatever opens a bundle on TensorRT gets the stand-ins for library, GPU and plan."""

    def select(bundle: Bundle, wanted: Wanted, name: str | None = None) -> EngineRecord:
        return engine.record

    patch.setattr(opening, "CudaDevice", lambda: engine.device)
    patch.setattr(opening, "load_library", lambda name: cpu_library(engine, VERSION))
    patch.setattr(opening, "select_engine", select)


def opened(bundle: Bundle, *, max_batch: int = ROWS, capturable: bool = True, time_layers: bool = False) -> Opened:
    device = HostDevice()
    engine = cpu_engine(bundle, device)
    engine.capturable = capturable
    library = cpu_library(engine, VERSION)
    backend = TensorRTBackend(
        bundle, engine.record, library, device, max_seq=POSITIONS, max_batch=max_batch, time_layers=time_layers
    )
    return Opened(backend, device, engine)

"""A plan on the GPU, and its execution contexts, by the API that TensorRT and TensorRT for RTX share.

Not run on hardware yet.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from starling.engine.backends.cuda.device_memory import DeviceMemory
from starling.engine.backends.tensorrt.plan_record import EngineRecord
from starling.engine.backends.tensorrt.run.layer_times import LayerTimes
from starling.engine.backends.tensorrt.run.runtime_cache import RuntimeCache
from starling.engine.backends.tensorrt.runtimes import Library
from starling.engine.errors import BackendError
from starling.engine.host import cache_folder


class PlanExecution:
    """A deserialized plan. Its contexts share one scratch memory, so only one of them may run at a time."""

    def __init__(
        self, library: Library, record: EngineRecord, memory: DeviceMemory, times: LayerTimes | None = None
    ) -> None:
        """With `times` its contexts time their layers. Raises BackendError where the plan does not run here."""
        self._library, self._memory, self._times = library, memory, times
        self._profiles = [profile.name for profile in record.profiles]
        self._contexts: list[ExecutionContext] = []
        self._runtime = library.module.Runtime(library.logger)
        self._engine = _deserialize(self._runtime, library, record.plan_path)
        self._check_aliases(record.aliases)
        profiles = range(self._engine.num_optimization_profiles)
        self._scratch_bytes = max(self._engine.get_device_memory_size_for_profile_v2(index) for index in profiles)
        self._scratch = memory.allocate(self._scratch_bytes)
        # TensorRT for RTX compiles kernels on this machine; TensorRT did so when it built the plan.
        compiles = library.name == "tensorrt-rtx"
        self._cache = (
            RuntimeCache(cache_folder() / "tensorrt-rtx" / f"{record.plan.sha256}.cache") if compiles else None
        )

    def context(self, profile: str, *, fixed_shape: bool) -> ExecutionContext:
        """A context on the optimization profile of that name; `fixed_shape`: it is for one set of shapes only."""
        index, made = self._profiles.index(profile), self._new_context(fixed_shape)
        if self._times is None:
            context = ExecutionContext(made, index, self._library, self._memory)
        else:
            context = TimedContext(made, index, self._library, self._memory, self._times)
        self._contexts.append(context)
        return context

    def _check_aliases(self, aliases: Sequence[tuple[str, str]]) -> None:
        for past, present in aliases:
            found = self._engine.get_aliased_input_tensor(present)
            if found != past:
                raise BackendError(
                    f"the plan writes {present} to the memory of {found or 'no input'}, not of {past}: build it again"
                )

    def _new_context(self, fixed_shape: bool) -> Any:
        module = self._library.module
        strategy = module.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._cache is None:
            context = self._engine.create_execution_context(strategy)
        else:
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            kernels = module.DynamicShapesKernelSpecializationStrategy
            # A decode step is captured in our own graph, after its first run. EAGER has its kernels compiled by
            # then; LAZY would freeze the slow fallback ones in the graph. A prefill's length changes with every
            # prompt: LAZY begins at once and compiles beside it.
            config.dynamic_shapes_kernel_specialization_strategy = kernels.EAGER if fixed_shape else kernels.LAZY
            # TensorRT's own graph would leave out the copies that feed the next step, and cannot be captured in ours.
            config.cuda_graph_strategy = module.CudaGraphStrategy.DISABLED
            self._cache.attach(config)
            context = self._engine.create_execution_context(config)
        if context is None:
            raise BackendError(f"{self._library.title} made no execution context: {self._library.last_message()}")
        context.set_device_memory(self._scratch, self._scratch_bytes)
        return context

    def keep_compiled(self) -> None:
        """Write what was compiled since to the user's cache directory."""
        if self._cache is not None:
            self._cache.save()

    def close(self) -> None:
        """Keep what was compiled, and free the contexts and the plan."""
        self.keep_compiled()
        for context in self._contexts:
            context.close()
        self._engine = self._runtime = None


class ExecutionContext:
    """One context, on one profile. Every refusal of TensorRT's becomes a BackendError."""

    def __init__(self, context: Any, profile: int, library: Library, memory: DeviceMemory) -> None:
        self._context, self._library, self._memory = context, library, memory
        self._checked(
            context.set_optimization_profile_async(profile, memory.stream), f"take optimization profile {profile}"
        )

    def set_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Shapes of inputs by name, each within the profile."""
        for name, shape in shapes.items():
            self._checked(self._context.set_input_shape(name, shape), f"take {name} of shape {list(shape)}")

    def set_addresses(self, addresses: Mapping[str, int]) -> None:
        """Device addresses of inputs and outputs by name."""
        for name, address in addresses.items():
            self._checked(self._context.set_tensor_address(name, address), f"take the address of {name}")

    def check_complete(self) -> None:
        """Raise BackendError where an input has no shape yet."""
        missing = self._context.infer_shapes()
        if missing:
            raise BackendError(f"the plan has inputs that this version does not know: {', '.join(missing)}")

    @property
    def can_be_captured(self) -> bool:
        """Whether a run may become part of a CUDA graph."""
        asked = getattr(self._context, "is_stream_capturable", None)
        return True if asked is None else bool(asked(self._memory.stream))

    def enqueue(self) -> None:
        """Put one run on the stream."""
        self._checked(self._context.execute_async_v3(self._memory.stream), "run a step of the model")

    def close(self) -> None:
        """Free the context, which cannot be used afterwards."""
        self._context = None

    def _checked(self, done: bool, what: str) -> None:
        if not done:
            raise BackendError(f"{self._library.title} could not {what}: {self._library.last_message()}")


class TimedContext(ExecutionContext):
    """A context that waits for the end of every run, and leaves its layers' times in `times`."""

    def __init__(self, context: Any, profile: int, library: Library, memory: DeviceMemory, times: LayerTimes) -> None:
        super().__init__(context, profile, library, memory)
        self._times = times
        times.attach(context)

    @property
    def can_be_captured(self) -> bool:
        """No: nobody can wait for a run, or ask for its layers, in the middle of a CUDA graph."""
        return False

    def enqueue(self) -> None:
        """One run, alone on the stream, to its end."""
        self._memory.synchronize()
        begin = perf_counter()
        super().enqueue()
        self._memory.synchronize()
        ms = (perf_counter() - begin) * 1e3
        self._checked(self._context.report_to_profiler(), "report its layers' times")
        self._times.end_run(ms)


def _deserialize(runtime: Any, library: Library, plan: Path) -> Any:
    try:
        # Mapped, not read: the weights are in the plan, and the host needs them only once.
        with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            engine = runtime.deserialize_cuda_engine(data)
    except (OSError, ValueError) as error:
        raise BackendError(f"{plan} cannot be read ({error}); build it again with: starling build") from error
    if engine is None:
        raise BackendError(f"{library.title} cannot load {plan}: {library.last_message()}")
    return engine

"""A session of ONNX Runtime on a GPU: CUDA's libraries, the provider's settings, the engine's operators in it."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from starling.engine.backends.cuda.cuda_device import Device
from starling.engine.backends.cuda.device_memory import DeviceMemory
from starling.engine.backends.cuda.token_sampler import SamplingKernel, check_sampling, sampling_kernel
from starling.engine.backends.onnxruntime.step_buffers import first_line
from starling.engine.bundle.file_records import CudaKernels
from starling.engine.errors import BackendError
from starling.engine.host import cache_folder
from starling.engine.kernels.cuda.compiler import CompilationError
from starling.engine.kernels.cuda.driver import DriverError
from starling.engine.kernels.cuda.operators import CudaOperators, Product
from starling.engine.kernels.cuda.variants import EPILOGUES

PROVIDER = "CUDAExecutionProvider"
SESSION_SETTINGS = {
    "session.intra_op.allow_spinning": "0",
    # Weights lie beside the arena.
    "session.use_device_allocator_for_initializers": "1",
    "ep.cuda.fpa_intb_gemm": "1",
}
#: 0 never takes the engine's own CUDA kernels for int8 products, 1 on every card; else where a card has shown them.
KERNELS_SWITCH = "STARLING_CUDA_KERNELS"
#: 0 never draws tokens on the GPU; 1 does so without the check that else goes before it.
SAMPLING_SWITCH = "STARLING_CUDA_SAMPLING"
#: In ONNX: y = Identity(x), float32 [1].
_SMALLEST_GRAPH = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)


def load_cuda(ort: Any) -> None:
    """Load CUDA's libraries, from where pip puts them too. ONNX Runtime prints what it does not find."""
    with redirect_stdout(io.StringIO()):
        ort.preload_dlls(cudnn=False)


def check_starts(ort: Any) -> None:
    """Raise BackendError where the provider does not start: a session of a model would load all of it for the CPU."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if ort.InferenceSession(_SMALLEST_GRAPH, options, providers=[PROVIDER]).get_providers()[0] != PROVIDER:
        raise BackendError(f"{PROVIDER} did not start on this machine; see `starling doctor`")


def own_operators(found: CudaKernels, memory: DeviceMemory, prefill_chunk: int) -> CudaOperators:
    """The engine's own kernels of a bundle's graph for them, on the card of `memory`.

    Raises KernelsUnavailable, CompilationError, DriverError or OSError where they cannot be had.
    """
    device = memory.device
    return CudaOperators(
        [Product(each.k, each.n, each.norm, EPILOGUES[each.around]) for each in found.products],
        target=device.target,
        multiprocessors=device.multiprocessors,
        stream=memory.stream,
        allocate=memory.allocate,
        prefill_chunk=prefill_chunk,
        cache=cache_folder() / "kernels",
    )


def open_sampling(device: Device, dtype: str) -> tuple[SamplingKernel | None, str | None]:
    """The kernel that draws tokens from logits of `dtype`; a note where it cannot be had, or is wrong on this card."""
    switch = os.environ.get(SAMPLING_SWITCH, "")
    if switch == "0":
        return None, None
    try:
        kernel = sampling_kernel(device, dtype, cache_folder() / "kernels")
    except (CompilationError, DriverError, OSError) as error:
        return None, f"the host draws tokens: {error}"
    try:
        if switch != "1":
            check_sampling(kernel, device, dtype)
    except (BackendError, DriverError) as error:
        kernel.close()
        return None, f"the host draws tokens: {error}"
    return kernel, None


def open_session(
    ort: Any,
    graph: Path,
    stream: int,
    operators: CudaOperators | None,
    *,
    captures: bool,
    profile_prefix: Path | None,
    settings: Mapping[str, str],
) -> Any:
    """A session of the graph that runs on `stream`. Raises BackendError where it cannot be loaded."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # the GPU computes
    options.log_severity_level = 3
    if profile_prefix is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile_prefix)
    for key, value in settings.items():
        options.add_session_config_entry(key, value)
    if operators is not None:
        operators.register(options)
    provider = {
        "user_compute_stream": str(stream),
        "enable_cuda_graph": str(int(captures)),
        "arena_extend_strategy": "kSameAsRequested",
    }
    try:
        return ort.InferenceSession(str(graph), options, providers=[(PROVIDER, provider)])
    except Exception as error:
        raise BackendError(f"ONNX Runtime cannot load {graph}: {first_line(error)}") from error

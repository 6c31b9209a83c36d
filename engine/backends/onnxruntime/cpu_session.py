"""An ONNX Runtime session on the CPU over a bundle's graph, with the engine's own kernels where they run it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from starling.engine.backends.onnxruntime.cache_graph import graph_with_cache
from starling.engine.backends.onnxruntime.huge_pages import huge_pages
from starling.engine.backends.onnxruntime.step_buffers import ONNX_TYPES, first_line
from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import BackendError
from starling.engine.installation import install_command
from starling.engine.kernels import KernelLibrary, KernelsUnavailable, require_kernel_library

CPU = "CPUExecutionProvider"


def import_onnxruntime() -> Any:
    """The onnxruntime module. Raises BackendError when neither onnxruntime nor onnxruntime-gpu is installed."""
    try:
        return import_module("onnxruntime")
    except ImportError as error:
        raise BackendError(
            f"onnxruntime is not installed ({error}): {install_command('cpu')}, or {install_command('gpu')} for CUDA"
        ) from error


@dataclass(slots=True, eq=False)
class CpuSession:
    """An open session. `kernels` is the instruction set of our kernels, where they run it; `kernels_note` why not."""

    ort: Any
    session: Any
    graph_path: Path
    kernels: str | None
    kernels_note: str | None


def open_cpu_session(
    bundle: Bundle, threads: int, *, takes_turns: bool = False, profile_prefix: Path | None = None
) -> CpuSession:
    """Load the bundle's graph. With `profile_prefix` ONNX Runtime times every operator.

    Between two runs its threads wait for the next one by spinning, unless it `takes_turns` with another session: that
    one's runs would take twice as long.

    Raises BackendError where ONNX Runtime is not installed or refuses the graph.
    """
    ort = import_onnxruntime()
    kernels, note = cpu_kernels(bundle)
    path = bundle.reference_path if kernels is None else bundle.folder / str(bundle.kernel_graph)
    options = _options(ort, bundle, threads, kernels, profile_prefix)
    if takes_turns:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    graph: str | bytes = str(path)
    if (kind := bundle.replaced_kv_dtype) is not None:
        if kernels is None:
            raise BackendError(f"{bundle.folder}: its KV cache stays {kind} {note}: leave kv_dtype out")
        graph = graph_with_cache(path, ONNX_TYPES[bundle.kv_cache.dtype])
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.folder))
    session = _open_session(ort, path, graph, options)
    return CpuSession(ort, session, path, None if kernels is None else kernels.instruction_set_of(bundle.dtype), note)


def cpu_kernels(bundle: Bundle) -> tuple[KernelLibrary | None, str | None]:
    """The CPU kernels for this bundle, or why there are none where it could be otherwise."""
    if bundle.kernel_graph is None:
        return None, None
    try:
        return require_kernel_library(), None
    except KernelsUnavailable as error:
        return None, f"without CPU kernels: {error}"


def _options(ort: Any, bundle: Bundle, threads: int, kernels: KernelLibrary | None, profile_prefix: Path | None) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    if profile_prefix is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile_prefix)
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    if bundle.dialect == "tensorrt":  # else it multiplies quantized weights with activations that it rounds as it likes
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if kernels is not None:
        options.register_custom_ops_library(str(kernels.path))
    return options


def _open_session(ort: Any, path: Path, graph: str | bytes, options: Any) -> Any:
    try:
        with huge_pages():
            return ort.InferenceSession(graph, options, providers=[CPU])
    except Exception as error:
        raise BackendError(f"ONNX Runtime cannot load {path}: {first_line(error)}") from error

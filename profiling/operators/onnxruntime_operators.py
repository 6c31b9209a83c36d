"""Every operator's time on ONNX Runtime, by its own profiler."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from starling.engine.backends.backend import PREFILL_CHUNK
from starling.engine.backends.onnxruntime.cpu_session import import_onnxruntime
from starling.engine.backends.onnxruntime.onnxruntime_backend import OrtBackend
from starling.engine.backends.onnxruntime.onnxruntime_cuda import open_cuda
from starling.engine.bundle.manifest import Bundle
from starling.engine.onnx_bytes import read_nodes
from starling.engine.text.tokenizer import Tokenizer
from starling.profiling.exact_prompts import prompt_tokens
from starling.profiling.operators.layer_parts import LayerParts
from starling.profiling.operators.operator_times import (
    DECODES,
    Kernel,
    OperatorProfile,
    ProfiledRun,
    by_phase,
    run_phases,
)


def profile_ort_operators(bundle: Bundle, *, prompt: int, batch: int, threads: int, on_gpu: bool) -> OperatorProfile:
    """Open the bundle in a session of its own with ONNX Runtime's profiler on, and run both phases.

    The prompt is cut to one chunk, so that a prefill is one run of the graph. Raises BackendError as opening does.
    """
    prompt = min(prompt, PREFILL_CHUNK)
    tokens = np.array(prompt_tokens(Tokenizer.load(bundle.folder, bundle.architecture.vocab_size), prompt, 0), np.int64)
    with TemporaryDirectory(prefix="starling-profile-") as folder:
        room: dict[str, Any] = {"max_seq": prompt + DECODES + 1, "max_batch": batch, "prefill_chunk": prompt}
        prefix = Path(folder) / "run"
        running = (
            open_cuda(import_onnxruntime(), bundle, **room, profile_prefix=prefix)
            if on_gpu
            else OrtBackend(bundle, threads=threads, **room, profile_prefix=prefix)
        )
        try:
            prefills = run_phases(running, tokens, batch)
            events = json.loads(running.end_profiling().read_text())
        finally:
            running.close()
    phases = by_phase(_runs(events), prefills, LayerParts(read_nodes(running.graph_path)))
    return OperatorProfile("ONNX Runtime", prompt, batch, *phases)


def _runs(events: list[dict[str, object]]) -> list[ProfiledRun]:
    """The runs of the model in a file of ONNX Runtime's profiler (Chrome's trace format), in their order."""
    runs: list[ProfiledRun] = []
    kernels: list[Kernel] = []
    for event in events:
        name, args = str(event["name"]), event.get("args")
        if event.get("cat") == "Node" and name.endswith("_kernel_time") and isinstance(args, dict):
            kernels.append(Kernel(name.removesuffix("_kernel_time"), str(args["op_name"]), float(str(event["dur"]))))
        elif name == "model_run":  # written when the run is over, after its kernels
            runs.append(ProfiledRun(float(str(event["dur"])) / 1e3, kernels))
            kernels = []
    return runs

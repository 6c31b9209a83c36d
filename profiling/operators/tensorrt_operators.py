"""Every layer's time on TensorRT, by its IProfiler. Not run on hardware yet."""

from __future__ import annotations

import numpy as np

from starling.engine.backends.tensorrt.run.layer_times import TimedRun
from starling.engine.backends.tensorrt.run.open_tensorrt import open_tensorrt
from starling.engine.bundle.manifest import Bundle
from starling.engine.onnx_bytes import read_nodes
from starling.engine.text.tokenizer import Tokenizer
from starling.profiling.exact_prompts import prompt_tokens
from starling.profiling.operators.operator_times import Kernel, OperatorProfile, ProfiledRun, by_phase, run_phases
from starling.profiling.operators.tensorrt_layers import TensorRTLayers


def profile_tensorrt_operators(
    bundle: Bundle, *, runtime: str, engine: str | None, prompt: int, batch: int, max_seq: int, max_batch: int
) -> OperatorProfile:
    """Open the bundle on a backend of its own that times its layers, and run both phases.

    `runtime`, `engine`, `max_seq` and `max_batch` choose the plan as opening does. The prompt is cut to what the plan
    prefills in one run. Raises BackendError and PlanError as opening does, and where TensorRT times no layers.
    """
    ids = prompt_tokens(Tokenizer.load(bundle.folder, bundle.architecture.vocab_size), prompt, 0)
    running = open_tensorrt(
        bundle,
        runtime,
        engine=engine,
        max_seq=max_seq,
        max_batch=max_batch,
        prefill_chunk=prompt,
        time_layers=True,
    )
    try:
        tokens = np.array(ids[: running.prefill_chunk], np.int64)
        prefills = run_phases(running, tokens, batch)
        runs = running.take_layer_times()
    finally:
        running.close()
    layers = TensorRTLayers(read_nodes(bundle.graph_path))
    phases = by_phase([_profiled(run, layers) for run in runs], prefills, layers)
    return OperatorProfile("TensorRT", len(tokens), batch, *phases)


def _profiled(run: TimedRun, layers: TensorRTLayers) -> ProfiledRun:
    return ProfiledRun(run.ms, [Kernel(name, layers.operator(name), ms * 1e3) for name, ms in run.layers])

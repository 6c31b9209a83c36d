"""The stages in the order in which they are worth running, how long each takes at most, and what it prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from starling.profiling.gpu.stages.kit import Kit


@dataclass(frozen=True, slots=True)
class Stage:
    """`run` is a module of this package and a function in it; `seconds` suffice on an H200."""

    name: str
    run: str
    seconds: int
    says: str

    def function(self) -> Callable[[Kit], None]:
        """Loaded now: PyTorch comes with it."""
        module, _, name = self.run.partition(":")
        function: Callable[[Kit], None] = getattr(import_module(f"starling.profiling.gpu.stages.{module}"), name)
        return function


STAGES = (
    Stage("correctness", "correctness:run", 90, "KL to PyTorch a bundle and shape; whether all ways of decoding agree"),
    Stage("kernels", "kernel_tuning:run", 60, "our CUDA kernels: checks, the best variant a product, measured.json"),
    Stage("weights", "large_weights:run", 60, "bytes and seconds of each bundle of the 7B shape"),
    Stage(
        "int8", "throughput:run_int8", 90, "ms a step, tokens/s, TTFT, memory, seconds to open; ours and ONNX Runtime's"
    ),
    Stage(
        "sampling",
        "sampling_kernel:run",
        60,
        "draws against NumPy, microseconds of the kernel, ms a step that draws beside a greedy one",
    ),
    Stage(
        "prefill", "throughput:run_first_tokens", 60, "TTFT by length: fp16, int8, by the size of dequantized blocks"
    ),
    Stage("fp16", "throughput:run_fp16", 60, "the same for fp16, and prefill in chunks"),
    Stage("roof", "bandwidth_roof:run", 40, "TB/s of copying and reading, microseconds of each matrix product"),
    Stage("command", "command_runs:run", 60, "what `starling profile` and `starling generate` print"),
    Stage("timeline", "device_kernels:run", 60, "the kernels that a prefill and a decode step spend their time in"),
    Stage("settings", "throughput:run_settings", 90, "the same figures with each session setting changed"),
    Stage("peers", "torch_peers:run", 190, "PyTorch eager, with a static cache in a CUDA graph, and compiled"),
)

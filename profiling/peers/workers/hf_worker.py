"""The `generate` of transformers as a worker: over PyTorch, eager or compiled with a static cache, or optimum-onnx."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.generation.streamers import BaseStreamer

if TYPE_CHECKING:  # a peer's environment lacks our package
    from starling.profiling.peers.workers.worker import Arrived, Feed, Setup

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class Worker:
    """A Hugging Face folder, or one that optimum-onnx exported.

    Settings: `library` is transformers or optimum-onnx; for transformers also `dtype`, a torch dtype's name, and
    `compiled`.
    """

    def __init__(self) -> None:
        self._model: Any = None
        self._options: dict[str, Any] = {}

    def open(self, setup: Setup) -> dict[str, str]:
        torch.set_num_threads(setup.threads)
        if setup.settings["library"] == "optimum-onnx":
            self._model, packages = _optimum_onnx(setup), ["optimum-onnx", "optimum", "onnxruntime"]
        else:
            self._model, packages = _transformers(setup), []
        self._model.generation_config.eos_token_id = None  # go on after an end token
        if setup.settings.get("compiled"):
            self._options = _compiled(self._model, setup)
        return {name: version(name) for name in [*packages, "transformers", "torch", "numpy"]}

    def start(self, prompt: list[int], new_tokens: int) -> Callable[[Arrived], None]:
        ids = torch.tensor([prompt], device=self._model.device)
        mask = torch.ones_like(ids)
        if "past_key_values" in self._options:
            self._options["past_key_values"].reset()

        def generate(arrived: Arrived) -> None:
            self._model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                do_sample=False,
                streamer=_Streamer(arrived),
                **self._options,
            )

        return generate

    def begin(self) -> Feed:
        model, cache, written = self._model, None, 0

        def feed(tokens: list[int]) -> npt.NDArray[np.float32]:
            nonlocal cache, written
            written += len(tokens)
            ids = torch.tensor([tokens], device=model.device)
            mask = torch.ones((1, written), dtype=torch.int64, device=model.device)
            with torch.inference_mode():
                out = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            last: npt.NDArray[np.float32] = out.logits[0, -1].float().cpu().numpy()
            return last

        return feed


class _Streamer(BaseStreamer):
    """Passes on the tokens of `generate`, whose first call shows the prompt."""

    def __init__(self, arrived: Arrived) -> None:
        self._arrived = arrived
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            for token in value.flatten().tolist():
                self._arrived(token)
        self._prompt_seen = True

    def end(self) -> None:
        pass


def _transformers(setup: Setup) -> Any:
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, setup.settings["dtype"])
    model: Any = AutoModelForCausalLM.from_pretrained(setup.model, dtype=dtype, local_files_only=True)
    return model.to(setup.device).eval()


def _optimum_onnx(setup: Setup) -> Any:
    import onnxruntime  # type: ignore[import-untyped]
    from optimum.onnxruntime import ORTModelForCausalLM  # type: ignore[import-not-found]  # in its own environment only

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = setup.threads
    return ORTModelForCausalLM.from_pretrained(
        setup.model, provider=PROVIDERS[setup.device], session_options=options, local_files_only=True
    )


def _compiled(model: Any, setup: Setup) -> dict[str, Any]:
    """One cache for all runs: `generate` compiles the forward pass of a static one, once as its shape never changes."""
    from transformers import CompileConfig, StaticCache

    config: Any = CompileConfig()
    config._compile_all_devices = True  # transformers compiles on accelerators only, unless told
    return {
        "past_key_values": StaticCache(config=model.config, max_cache_len=setup.capacity),
        "compile_config": config,
    }

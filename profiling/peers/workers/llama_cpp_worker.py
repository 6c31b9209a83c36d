"""llama.cpp as a worker, through llama-cpp-python's bindings of its C API, without their Python sampling."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llama_cpp  # type: ignore[import-not-found]  # in the peer's environment only
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # a peer's environment lacks our package
    from starling.profiling.peers.workers.worker import Arrived, Feed, Setup


class Worker:
    """A folder with one `.gguf` file, run by `llama_decode` and llama.cpp's own greedy sampler.

    `settings` are fields of llama.cpp's `llama_model_params`.
    """

    def __init__(self) -> None:
        self._model: Any = None
        self._context: Any = None
        self._sampler: Any = None

    def open(self, setup: Setup) -> dict[str, str]:
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        model.n_gpu_layers = 0 if setup.device == "cpu" else -1
        for name, value in setup.settings.items():
            setattr(model, name, value)
        file = next(Path(setup.model).glob("*.gguf"))
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), model)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = setup.capacity
        params.n_batch = max(params.n_batch, setup.capacity)  # a prompt is one call; its own micro-batches stay
        params.n_threads = params.n_threads_batch = setup.threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot run {file}")
        self._sampler = llama_cpp.llama_sampler_init_greedy()
        return {"llama-cpp-python": version("llama-cpp-python"), "numpy": np.__version__}

    def start(self, prompt: list[int], new_tokens: int) -> Callable[[Arrived], None]:
        self._clear()

        def generate(arrived: Arrived) -> None:
            self._decode(prompt)
            for step in range(1, new_tokens + 1):
                token = llama_cpp.llama_sampler_sample(self._sampler, self._context, -1)
                arrived(token)
                if step < new_tokens:
                    self._decode([token])

        return generate

    def begin(self) -> Feed:
        self._clear()
        vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

        def feed(tokens: list[int]) -> npt.NDArray[np.float32]:
            self._decode(tokens)
            last = llama_cpp.llama_get_logits_ith(self._context, -1)
            return np.ctypeslib.as_array(last, shape=(vocabulary,)).copy()

        return feed

    def _clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def _decode(self, tokens: list[int]) -> None:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        status = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(array, len(tokens)))
        if status != 0:
            raise RuntimeError(f"llama_decode of {len(tokens)} tokens gave {status}")

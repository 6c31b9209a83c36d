"""onnxruntime-genai as a worker. Imports nothing but it and numpy: it runs in the peer's own environment."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnxruntime_genai as og  # type: ignore[import-not-found]  # in the peer's environment only

if TYPE_CHECKING:  # a peer's environment lacks our package
    from starling.profiling.peers.workers.worker import Arrived, Feed, Setup


class Worker:
    """A model folder with a `genai_config.json`, run greedily by the unmodified onnxruntime-genai."""

    def __init__(self) -> None:
        self._model: og.Model | None = None
        self._capacity = 0

    def open(self, setup: Setup) -> dict[str, str]:
        config = og.Config(setup.model)
        if setup.device != "cpu":
            config.clear_providers()
            config.append_provider(setup.device)
        config.overlay(json.dumps(_overlay(Path(setup.model), setup.threads)))
        self._model, self._capacity = og.Model(config), setup.capacity
        return {"onnxruntime-genai": og.__version__, "onnxruntime": _onnxruntime_version(), "numpy": np.__version__}

    def start(self, prompt: list[int], new_tokens: int) -> Callable[[Arrived], None]:
        generator = self._generator(len(prompt) + new_tokens)

        def generate(arrived: Arrived) -> None:
            generator.append_tokens(np.array(prompt, np.int32))
            while not generator.is_done():
                generator.generate_next_token()
                arrived(int(generator.get_next_tokens()[0]))

        return generate

    def begin(self) -> Feed:
        return _feed(self._generator(self._capacity))

    def _generator(self, length: int) -> Any:
        params = og.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, max_length=length, min_length=length)
        return og.Generator(self._model, params)


def _feed(generator: Any) -> Feed:
    def feed(tokens: list[int]) -> npt.NDArray[np.float32]:
        generator.append_tokens(np.array(tokens, np.int32))
        # [1, 1, vocab], or [1, len(tokens), vocab] where the graph computes all positions.
        return np.array(generator.get_logits()[0, -1], np.float32)

    return feed


def _overlay(model: Path, threads: int) -> dict[str, object]:
    """Settings over the folder's own `genai_config.json`: threads, and an end-of-sequence token that never comes.

    `min_length` alone forbids the end token, which changes the greedy text. The vocabulary's last id takes the end
    token's place (genai refuses one outside the vocabulary) and is the one that `min_length` forbids.
    """
    vocabulary = json.loads((model / "genai_config.json").read_text(encoding="utf-8"))["model"]["vocab_size"]
    options = {"intra_op_num_threads": threads}
    return {"model": {"eos_token_id": vocabulary - 1, "decoder": {"session_options": options}}}


def _onnxruntime_version() -> str:
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"

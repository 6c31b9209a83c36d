"""onnxruntime-genai as a worker. Imports nothing but it and numpy: it runs in the peer's own environment."""

import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime_genai as og  # type: ignore[import-not-found]  # in the peer's environment only


class Worker:
    """A model folder with a `genai_config.json`, run greedily by the unmodified onnxruntime-genai."""

    def __init__(self) -> None:
        self._model: og.Model | None = None

    def open(self, model: str, threads: int, capacity: int) -> dict[str, str]:
        config = og.Config(model)
        config.overlay(json.dumps(_overlay(Path(model), threads)))
        self._model = og.Model(config)
        return {"onnxruntime-genai": og.__version__, "onnxruntime": _onnxruntime_version(), "numpy": np.__version__}

    def start(self, prompt: list[int], new_tokens: int) -> Iterator[int]:
        length = len(prompt) + new_tokens
        params = og.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, max_length=length, min_length=length)
        return _tokens(og.Generator(self._model, params), np.array(prompt, np.int32))


def _tokens(generator: og.Generator, prompt: npt.NDArray[np.int32]) -> Iterator[int]:
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
        yield int(generator.get_next_tokens()[0])


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

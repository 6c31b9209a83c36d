"""OpenVINO GenAI as a worker; its logits come from OpenVINO itself, with the same model and settings."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import openvino as ov  # type: ignore[import-not-found]  # in the peer's environment only
import openvino_genai as ov_genai  # type: ignore[import-not-found]

if TYPE_CHECKING:  # a peer's environment lacks our package
    from starling.profiling.peers.workers.worker import Arrived, Feed, Setup


class Worker:
    """A folder of optimum-intel, run by an LLMPipeline; `settings` are OpenVINO's properties."""

    def __init__(self) -> None:
        self._setup: Setup | None = None
        self._pipeline: Any = None
        self._compiled: Any = None

    def open(self, setup: Setup) -> dict[str, str]:
        self._setup = setup
        self._pipeline = ov_genai.LLMPipeline(setup.model, _device(setup), **_properties(setup))
        return {name: version(name) for name in ("openvino", "openvino-genai", "openvino-tokenizers", "numpy")}

    def start(self, prompt: list[int], new_tokens: int) -> Callable[[Arrived], None]:
        config = ov_genai.GenerationConfig()
        config.max_new_tokens = new_tokens
        config.do_sample = False
        config.ignore_eos = True
        ids = ov.Tensor(np.array([prompt], np.int64))
        inputs = ov_genai.TokenizedInputs(ids, ov.Tensor(np.ones((1, len(prompt)), np.int64)))

        def generate(arrived: Arrived) -> None:
            self._pipeline.generate(inputs, config, _Streamer(arrived))

        return generate

    def begin(self) -> Feed:
        if self._compiled is None:
            assert self._setup is not None
            file = Path(self._setup.model) / "openvino_model.xml"
            self._compiled = ov.Core().compile_model(file, _device(self._setup), _properties(self._setup))
        return _feed(self._compiled.create_infer_request())


class _Streamer(ov_genai.StreamerBase):  # type: ignore[misc]
    """Passes the token ids on, without their text."""

    def __init__(self, arrived: Arrived) -> None:
        super().__init__()
        self._arrived = arrived

    def write(self, token: int | list[int]) -> Any:
        for one in token if isinstance(token, list) else [token]:
            self._arrived(one)
        return ov_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


def _device(setup: Setup) -> str:
    return {"cpu": "CPU", "cuda": "GPU"}[setup.device]


def _properties(setup: Setup) -> dict[str, Any]:
    return {"INFERENCE_NUM_THREADS": setup.threads, **setup.settings}


def _feed(request: Any) -> Feed:
    written = 0

    def feed(tokens: list[int]) -> npt.NDArray[np.float32]:
        nonlocal written
        first, written = written, written + len(tokens)
        outputs = request.infer(
            {
                "input_ids": np.array([tokens], np.int64),
                "attention_mask": np.ones((1, written), np.int64),
                "position_ids": np.arange(first, written, dtype=np.int64)[None],
                "beam_idx": np.zeros(1, np.int32),
            }
        )
        return np.array(outputs["logits"][0, -1], np.float32)

    return feed

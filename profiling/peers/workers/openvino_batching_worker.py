"""OpenVINO GenAI's continuous batching as a worker: requests are added at once, and steps run until all have ended."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino as ov  # type: ignore[import-not-found]  # in the peer's environment only
import openvino_genai as ov_genai  # type: ignore[import-not-found]

if TYPE_CHECKING:  # a peer's environment lacks our package
    from starling.profiling.peers.workers.worker import Setup


class Worker:
    """A folder of optimum-intel, run by a ContinuousBatchingPipeline with known prefixes kept, and else its defaults.

    `settings` are OpenVINO's properties. The memory of its KV cache grows as it needs.
    """

    def __init__(self) -> None:
        self._pipeline: Any = None

    def open(self, setup: Setup) -> dict[str, str]:
        scheduler = ov_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = True
        properties = {"INFERENCE_NUM_THREADS": setup.threads, **setup.settings}
        self._pipeline = ov_genai.ContinuousBatchingPipeline(setup.model, scheduler, "CPU", properties)
        return {name: version(name) for name in ("openvino", "openvino-genai", "openvino-tokenizers", "numpy")}

    def answer_all(self, prompts: list[list[int]], new_tokens: int, arrived: Callable[[int, int], None]) -> None:
        config = ov_genai.GenerationConfig()
        config.max_new_tokens = new_tokens
        config.do_sample = False
        config.ignore_eos = True
        handles = [
            self._pipeline.add_request(number, ov.Tensor(np.array([prompt], np.int64)), config)
            for number, prompt in enumerate(prompts)
        ]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            for number, handle in enumerate(handles):
                while handle.can_read():
                    for output in handle.read().values():
                        for token in output.generated_ids:
                            arrived(number, token)

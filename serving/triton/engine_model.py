"""The Triton model that holds the engine. It answers no prompts itself: entries reach it by a local socket.

Its one input, `command`, is `address` (where the socket is) or `stats` (the scheduler's figures, as JSON).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from starling.engine.errors import shown
from starling.serving.triton.entry_inputs import Inputs, Tensor, text_array
from starling.serving.triton.socket_messages import RequestError

if TYPE_CHECKING:
    from starling.engine.engine import Engine
    from starling.engine.generation.results import Timings

INPUTS = (Tensor("command", "STRING", optional=False),)
_NUMBERS = ("max_batch", "max_seq", "threads", "queue_limit", "prefix_cache")
OUTPUTS = (Tensor("answer", "STRING"),)


class TritonPythonModel:
    """What Triton's Python backend makes of this model: one instance, one engine."""

    def initialize(self, args: dict[str, Any]) -> None:
        """Load the bundle that config.pbtxt names and start the loop. What it raises is Triton's reason to refuse."""
        self._pb_utils = import_module("triton_python_backend_utils")
        self._engine, loop = open_engine(args)
        from starling.engine.serving_loop import ServingLoop
        from starling.serving.triton.engine_socket import EngineSocket

        self._serving = ServingLoop(self._engine, **loop)
        self._metrics = self._make_metrics(args["model_name"])
        self._socket = EngineSocket(self._serving, self._engine.tokenizer, self._ended)
        self._pb_utils.Logger.log_info(
            f"starling: {self._engine.bundle.folder} on {self._engine.backend.name}, {self._engine.max_batch} rows of "
            f"{self._engine.max_seq} positions, loaded in {self._engine.load_seconds:.2f} s"
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer commands; any client may send one, and what is wrong with it is no other request's matter."""
        return [self._answered(request) for request in requests]

    def finalize(self) -> None:
        """End running requests as cancelled, and free the engine."""
        self._serving.close(drain=False)
        self._socket.close()
        if self._metrics is not None:
            self._metrics.close()
        self._engine.close()

    def _answered(self, request: Any) -> Any:
        try:
            return self._answer(request)
        except Exception as error:
            self._pb_utils.Logger.log_error(f"starling: {type(error).__name__}: {error}")
            refused = self._pb_utils.TritonError(
                f"{type(error).__name__}: {error}", self._pb_utils.TritonError.INTERNAL
            )
            return self._pb_utils.InferenceResponse(error=refused)

    def _answer(self, request: Any) -> Any:
        from starling.serving.triton.engine_socket import stats_json

        pb_utils = self._pb_utils
        inputs = Inputs({"command": pb_utils.get_input_tensor_by_name(request, "command").as_numpy()}, batched=False)
        try:
            command = inputs.one("command")
        except RequestError as wrong:
            invalid = pb_utils.TritonError(str(wrong), pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=invalid)
        if command == "address":
            answer = self._socket.address
        elif command == "stats":
            answer = stats_json(self._serving)
        else:
            error = pb_utils.TritonError(
                f"command is {shown(command)}: give address or stats", pb_utils.TritonError.INVALID_ARG
            )
            return pb_utils.InferenceResponse(error=error)
        output = pb_utils.Tensor("answer", text_array(answer, batched=False).astype(np.object_))
        return pb_utils.InferenceResponse([output])

    def _make_metrics(self, model_name: str) -> Any:
        from starling.serving.metrics.triton_metrics import TritonMetrics

        try:
            return TritonMetrics(self._pb_utils, model_name, self._serving.stats)
        except self._pb_utils.TritonModelException as error:  # the usual reason: it was started without them
            self._pb_utils.Logger.log_warn(f"starling: no metrics, since the server gives none: {error}")
            return None

    def _ended(self, timings: Timings) -> None:
        if self._metrics is not None:
            self._metrics.ended(timings)


def open_engine(args: Mapping[str, Any]) -> tuple[Engine, dict[str, int]]:
    """The engine that config.pbtxt asks for, and its settings for the engine's loop; `args` are Triton's."""
    if args["model_instance_kind"] == "GPU":  # before anything looks for a GPU
        os.environ["CUDA_VISIBLE_DEVICES"] = str(args["model_instance_device_id"])
    from starling.engine.engine import Engine

    settings = engine_settings(json.loads(args["model_config"])["parameters"])
    loop: dict[str, int] = {name: settings.pop(name) for name in ("queue_limit", "prefix_cache") if name in settings}
    version = Path(args["model_repository"]) / args["model_version"]
    if "draft" in settings:
        settings["draft"] = version / settings["draft"]
    return Engine(version / settings.pop("bundle"), **settings), loop


def engine_settings(parameters: dict[str, dict[str, str]]) -> dict[str, Any]:
    """config.pbtxt's parameters as arguments of Engine, with bundle and those of ServingLoop."""
    texts = {name: value["string_value"] for name, value in parameters.items()}
    numbers: dict[str, Any] = {name: int(texts[name]) for name in _NUMBERS if name in texts}
    return {
        **numbers,
        **{name: texts[name] for name in ("bundle", "draft", "backend", "engine", "speculation") if name in texts},
    }

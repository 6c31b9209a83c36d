"""Responses and errors of a Triton model, by Triton's own module, which exists in the processes that Triton starts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib import import_module
from typing import Any

from numpy.typing import NDArray

from starling.serving.triton.socket_messages import RequestError


class Responses:
    """Sends what a model answers; any thread may."""

    def __init__(self) -> None:
        self.pb_utils = import_module("triton_python_backend_utils")
        codes = self.pb_utils.TritonError
        self._codes = {
            "invalid": codes.INVALID_ARG,
            "unavailable": codes.UNAVAILABLE,
            "cancelled": codes.CANCELLED,
            "internal": codes.INTERNAL,
        }

    def send(self, sender: Any, outputs: Mapping[str, NDArray[Any]], wanted: Collection[str], *, last: bool) -> None:
        """Those of the outputs that the request asked for."""
        # An output that nobody asked for crashes the stub of Triton 2.51 on Python 3.12.
        tensors = [self.pb_utils.Tensor(name, array) for name, array in outputs.items() if name in wanted]
        flags = self.pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0
        sender.send(self.pb_utils.InferenceResponse(tensors), flags=flags)

    def fail(self, sender: Any, error: Exception) -> None:
        """End a request with an error: a RequestError of its kind, any other as the client's mistake."""
        kind = error.kind if isinstance(error, RequestError) else "invalid"
        response = self.pb_utils.InferenceResponse(error=self.pb_utils.TritonError(str(error), self._codes[kind]))
        sender.send(response, flags=self.pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def fail_unexpectedly(self, sender: Any, error: Exception) -> None:
        """End a request with an error that is ours, and log it."""
        self.pb_utils.Logger.log_error(f"starling: {type(error).__name__}: {error}")
        self.fail(sender, RequestError(f"unexpected {type(error).__name__}: {error}", "internal"))

"""What tests of scores over HTTP ask, and PyTorch's answer."""

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from http_server import MODEL, Server

from starling.export.check.torch_reference import reference_logits

TEXT = "The largest city in Japan is 東京 𓀀, and ünïcode is everywhere."
CHAT = [{"role": "user", "content": "a"}]


def pytorch(model: torch.nn.Module, ids: list[int]) -> npt.NDArray[np.float64]:
    """[len(ids), vocab]: log-probabilities after each token, by PyTorch."""
    return torch.log_softmax(reference_logits(model, ids).double(), -1).numpy()


def post(server: Server, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Status and document of a request."""
    status, _, content = server.request("POST", path, body)
    return status, json.loads(content)


def complete(server: Server, **body: Any) -> dict[str, Any]:
    """The document of a greedy completion."""
    status, document = post(server, "/v1/completions", {"model": MODEL, "temperature": 0, **body})
    assert status == 200, document
    return document

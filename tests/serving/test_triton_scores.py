"""Bundles that score or embed under Triton: what is written, how requests are read, and a real tritonserver."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton_server
from command_line import refusal, succeed
from numpy.typing import NDArray
from tiny_scorers import reward_module, texts
from triton_server import TritonServer, running

from starling.engine.text.tokenizer import Tokenizer
from starling.serving.triton.entry_inputs import Inputs
from starling.serving.triton.scoring_inputs import read_call
from starling.serving.triton.socket_messages import RequestError

pytestmark = pytest.mark.slow

TEXTS = ["Hi, how can I help you?", "Go away.", "Zürich " * 40]
TIMEOUT_S = 120


@pytest.fixture(scope="module")
def tokenizer(reward_bundle: Path) -> Tokenizer:
    return Tokenizer.load(reward_bundle, 32002)


def rewards(rows: list[list[int]]) -> list[float]:
    """PyTorch's reward of each text, one at a time."""
    with torch.inference_mode():
        module = reward_module(512)
        return [float(module(torch.tensor([row]))[0, 0]) for row in rows]


def read(**given: Any) -> Any:
    arrays = {}
    for name, value in given.items():
        values = value if isinstance(value, list) else [value]
        encoded = [one.encode() if isinstance(one, str) else one for one in values]
        arrays[name] = np.array(encoded, dtype=object if isinstance(values[0], str) else None)
    return read_call(Inputs(arrays, batched=False), {})


def test_a_repository_of_a_bundle_that_scores_is_one_model(reward_bundle: Path, tmp_path: Path) -> None:
    line = succeed("triton", reward_bundle, tmp_path / "models", "--max-batch", "3").splitlines()[0]
    assert line.endswith("models: model starling, which scores texts, 3 texts in a run, cpu")
    assert [path.name for path in (tmp_path / "models").iterdir() if path.is_dir()] == ["starling"]
    config = (tmp_path / "models/starling/config.pbtxt").read_text()
    assert 'name: "scores" data_type: TYPE_FP32 dims: [ -1, 1 ]' in config
    assert "decoupled" not in config
    assert "prefix_cache" not in config
    readme = (tmp_path / "models/README.md").read_text()
    assert "`scores` FP32" in readme
    assert "@{" not in readme
    compile((tmp_path / "models/starling/1/model.py").read_text(), "model.py", "exec")


def test_a_repository_of_a_bundle_that_embeds_has_vectors(embedding_bundle: Path, tmp_path: Path) -> None:
    succeed("triton", embedding_bundle, tmp_path / "models", "--copy")
    assert (tmp_path / "models/starling/1/bundle/bundle.json").is_file()
    config = (tmp_path / "models/starling/config.pbtxt").read_text()
    assert 'name: "embeddings" data_type: TYPE_FP32 dims: [ -1, 256 ]' in config


def test_what_a_bundle_that_scores_cannot_have_is_refused(reward_bundle: Path, tmp_path: Path) -> None:
    for arguments, named in (
        (("--speculation", "prompt-lookup"), "--speculation is about generating text"),
        (("--prefix-cache", "0"), "--prefix-cache is about generating text"),
        (("--instance-kind", "gpu"), "no backend on a GPU runs bundles that score or embed"),
        (("--max-seq", "513"), "--max-seq is 513, but this model has 512 positions"),
    ):
        assert named in refusal("triton", reward_bundle, tmp_path / "models", *arguments)
        assert not (tmp_path / "models").exists()


def test_texts_chats_and_ids_are_read() -> None:
    chat = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert read(text_input=["a", "b"]).texts == ["a", "b"]
    assert read(messages=json.dumps(chat)).texts == [[{"role": "user", "content": "Hi"}]]
    assert read(input_ids=[5, 6, 7], input_lengths=[1, 2]).texts == [[5], [6, 7]]
    assert read(input_ids=[5, 6]).texts == [[5, 6]]
    call = read(text_input="a", truncate_prompt_tokens=-1, truncation_side="left", use_activation=True)
    assert call.reading == {"template": None, "truncate": -1, "side": "left"}
    assert call.activation


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({}, "no text: give one of text_input, messages, input_ids"),
        ({"text_input": "a", "input_ids": [1]}, "text_input and input_ids: give one of"),
        ({"text_input": "a", "input_lengths": [1]}, "input_lengths is for input_ids"),
        ({"text_input": "a", "prompt": "b"}, "prompt is no input of this model"),
        ({"text_input": ["a"] * 2049}, "text_input has 2049 texts: a request takes 2048"),
        ({"text_input": "a" * 1_000_001}, "text_input has 1,000,001 characters in all"),
        ({"input_ids": [1, 2], "input_lengths": [1]}, "input_lengths do not add up to the 2 ids"),
        ({"input_ids": [1, 2], "input_lengths": [3, -1]}, "input_lengths do not add up to the 2 ids"),
        ({"messages": "{"}, "messages: chat 0 is not JSON"),
        ({"messages": "[" * 100_000}, "messages: chat 0 is not JSON"),
        ({"messages": "[5]"}, r"chat 0: messages\[0\] is no object"),
        ({"text_input": "a", "truncation_side": "top"}, "truncation_side is 'top': give left or right"),
        ({"text_input": "a", "use_activation": [True, False]}, "use_activation has 2 values: give one"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(given: dict[str, Any], line: str) -> None:
    with pytest.raises(RequestError, match=line) as refused:
        read(**given)
    assert refused.value.kind == "invalid"


def test_text_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(RequestError, match="text_input is not UTF-8"):
        read_call(Inputs({"text_input": np.array([b"\xff"], dtype=object)}, batched=False), {})


class Sender:
    """Triton's end of one request."""

    def __init__(self) -> None:
        self.sent: Queue[Any] = Queue()
        self.cancelled = False

    def send(self, response: Any, flags: int) -> None:
        self.sent.put(response)

    def is_cancelled(self) -> bool:
        return self.cancelled


def _tensor(name: str, array: NDArray[Any]) -> Any:
    return SimpleNamespace(name=lambda: name, as_numpy=lambda: array)


@pytest.fixture
def model(reward_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The model as Triton starts it, in this process: two requests at a time, one more may wait."""

    class TritonError(str):
        INVALID_ARG, UNAVAILABLE, CANCELLED, INTERNAL = range(4)

        def __new__(cls, message: str, code: int) -> TritonError:
            return super().__new__(cls, f"{code} {message}")

    pb_utils = SimpleNamespace(
        TritonError=TritonError,
        Tensor=_tensor,
        InferenceResponse=lambda tensors=(), error=None: error or {one.name(): one.as_numpy() for one in tensors},
        Logger=SimpleNamespace(log_error=print, log_info=print),
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", pb_utils)  # Triton itself makes this module
    from starling.serving.triton.scoring_model import TritonPythonModel

    settings = {"bundle": str(reward_bundle.resolve()), "max_batch": "2", "queue_limit": "1", "threads": "1"}
    parameters = {name: {"string_value": value} for name, value in settings.items()}
    made = TritonPythonModel()
    made.initialize(
        {
            "model_instance_kind": "CPU",
            "model_config": json.dumps({"parameters": parameters}),
            "model_repository": "/",
            "model_version": "1",
        }
    )
    yield made
    made.finalize()


def _request(sender: Sender, wanted: tuple[str, ...] = ("scores", "num_input_tokens"), **arrays: NDArray[Any]) -> Any:
    return SimpleNamespace(
        get_response_sender=lambda: sender,
        requested_output_names=lambda: wanted,
        inputs=lambda: [_tensor(name, array) for name, array in arrays.items()],
        parameters=lambda: "",
    )


def test_every_request_gets_its_own_numbers_or_its_own_refusal(model: Any) -> None:
    rows = texts()
    flat = np.array([token for row in rows for token in row], np.int64)
    senders = [Sender() for _ in range(3)]
    model.execute(
        [
            _request(senders[0], input_ids=flat, input_lengths=np.array([len(row) for row in rows], np.int32)),
            _request(senders[1], input_ids=np.array([32002], np.int64)),
            _request(senders[2], ("scores",), input_ids=np.array(rows[0], np.int64)),
        ]
    )
    answer, refused, alone = (sender.sent.get(timeout=TIMEOUT_S) for sender in senders)
    assert answer["scores"].dtype == np.float32
    assert answer["scores"][:, 0].tolist() == pytest.approx(rewards(rows), abs=1e-4)
    assert answer["num_input_tokens"].tolist() == [len(row) for row in rows]
    assert refused.startswith("0 input_ids: ")
    assert "32002" in refused
    assert list(alone) == ["scores"]


def test_too_many_requests_and_cancelled_ones_are_refused(model: Any) -> None:
    long = np.array([5] * 400 * 500, np.int64)
    lengths = np.full(500, 400, np.int32)
    senders = [Sender() for _ in range(4)]
    model.execute([_request(sender, input_ids=long, input_lengths=lengths) for sender in senders])
    busy = senders[3].sent.get(timeout=TIMEOUT_S)
    assert busy == "1 3 request(s) wait or run already: try again later"
    for sender in senders[:3]:
        sender.cancelled = True
    assert [sender.sent.get(timeout=TIMEOUT_S) for sender in senders[:3]] == ["2 the request was cancelled"] * 3
    after = Sender()
    model.execute([_request(after, input_ids=np.array([5, 6], np.int64))])
    assert after.sent.get(timeout=TIMEOUT_S)["scores"][0, 0] == pytest.approx(rewards([[5, 6]])[0], abs=1e-4)


@pytest.fixture(scope="module")
def server(reward_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    repository = tmp_path_factory.mktemp("repository") / "models"
    succeed("triton", reward_bundle, repository, "--max-batch", "4", "--threads", "2")
    made = triton_server.environment(repository)
    environment = triton_server.with_this_checkout(made, tmp_path_factory.mktemp("triton") / "environment")
    with running(repository, environment, tmp_path_factory.mktemp("log") / "server.log") as started:
        yield started


def infer(server: TritonServer, *inputs: tuple[str, str, list[Any]]) -> tuple[int, dict[str, Any]]:
    """Triton's own `infer`, which decoupled models refuse."""
    given = [{"name": name, "datatype": kind, "shape": [len(data)], "data": data} for name, kind, data in inputs]
    status, body = server.post("models/starling/infer", {"inputs": given})
    return status, json.loads(body)


def scores(server: TritonServer, *inputs: tuple[str, str, list[Any]]) -> list[float]:
    status, answer = infer(server, *inputs)
    assert status == 200, answer
    values: list[float] = next(one["data"] for one in answer["outputs"] if one["name"] == "scores")
    return values


def test_infer_gives_the_raw_scores_of_texts_and_of_ids(server: TritonServer, tokenizer: Tokenizer) -> None:
    rows = [tokenizer.encode(text) for text in TEXTS]
    expected = rewards(rows)
    assert scores(server, ("text_input", "BYTES", TEXTS)) == pytest.approx(expected, abs=1e-4)
    flat, lengths = [token for row in rows for token in row], [len(row) for row in rows]
    status, answer = infer(server, ("input_ids", "INT64", flat), ("input_lengths", "INT32", lengths))
    assert status == 200
    outputs = {one["name"]: one for one in answer["outputs"]}
    assert outputs["scores"]["data"] == pytest.approx(expected, abs=1e-4)
    assert (outputs["scores"]["shape"], outputs["num_input_tokens"]["data"]) == ([3, 1], lengths)
    probabilities = scores(server, ("text_input", "BYTES", TEXTS), ("use_activation", "BOOL", [True]))
    assert probabilities == pytest.approx([1 / (1 + np.exp(-score)) for score in expected], abs=1e-5)


def test_generate_takes_one_text_or_several(server: TritonServer, tokenizer: Tokenizer) -> None:
    expected = rewards([tokenizer.encode(text) for text in TEXTS])
    assert server.generate("starling", text_input=TEXTS)["scores"] == pytest.approx(expected, abs=1e-4)
    assert server.generate("starling", text_input=TEXTS[0])["scores"] == pytest.approx(expected[0], abs=1e-4)


def test_tritonclient_asks_by_grpc(server: TritonServer, tokenizer: Tokenizer) -> None:
    script = """if True:
        import json, sys
        import numpy as np
        import tritonclient.grpc as grpc
        texts = json.loads(sys.argv[2])
        given = grpc.InferInput("text_input", [len(texts)], "BYTES")
        given.set_data_from_numpy(np.array([text.encode() for text in texts], dtype=object))
        with grpc.InferenceServerClient(sys.argv[1]) as client:
            found = client.infer("starling", [given]).as_numpy("scores")
        print(json.dumps([str(found.dtype), list(found.shape), found.ravel().tolist()]))
    """
    command = [server.environment / "bin" / "python", "-c", script, server.grpc, json.dumps(TEXTS)]
    kind, shape, values = json.loads(subprocess.check_output(command, text=True, timeout=TIMEOUT_S))
    assert (kind, shape) == ("float32", [3, 1])
    assert values == pytest.approx(rewards([tokenizer.encode(text) for text in TEXTS]), abs=1e-4)


def test_refusals_are_tritons_errors_and_stop_nobody_else(server: TritonServer) -> None:
    for given, line in (
        ((("text_input", "BYTES", ["x", ""]),), "text_input: a text is empty"),
        ((("input_ids", "INT64", [-1]),), "input_ids: "),
        ((("text_input", "BYTES", ["x"]), ("truncate_prompt_tokens", "INT32", [0])), "truncate_prompt_tokens: "),
    ):
        status, answer = infer(server, *given)
        assert status == 400
        assert line in answer["error"]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda count: infer(server, ("text_input", "BYTES", ["x"] * count)), [1, 3000] * 8))
    assert [status for status, _ in found] == [200, 400] * 8

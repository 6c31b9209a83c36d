"""vLLM's `prompt_logprobs` with the real client: tables of a prompt's tokens, against PyTorch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openai
import pytest
import torch
from http_server import MODEL, Server, serving
from scores_over_http import CHAT, TEXT, complete, post, pytorch

from starling.engine.text.tokenizer import Tokenizer
from starling.export.check.torch_reference import load_reference
from starling.export.checkpoints.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[Server]:
    with serving(tiny_bundle, "--max-batch", "3", "--max-seq", "512") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client()


@pytest.fixture(scope="module")
def tokenizer(tiny_bundle: Path) -> Tokenizer:
    return Tokenizer.load(tiny_bundle, 32002)


@pytest.fixture(scope="module")
def model(tiny_bundle: Path, tiny_checkpoint: Checkpoint) -> torch.nn.Module:
    return load_reference(tiny_checkpoint.config, tiny_checkpoint.tensors)


def check_ranked(found: list[Any], ids: list[int], expected: npt.NDArray[np.float64]) -> None:
    """vLLM's tables of a prompt, with two alternatives, against PyTorch's log-probabilities."""
    assert len(found) == len(ids)
    assert found[0] is None
    for position, table in enumerate(found[1:], 1):
        assert table is not None
        token, row = ids[position], expected[position - 1]
        likeliest = np.argsort(-row)[:2].tolist()
        assert list(table) == [str(each) for each in dict.fromkeys([token, *likeliest])]
        for key, shown in table.items():
            assert shown["logprob"] == pytest.approx(row[int(key)], abs=1e-4)
            assert shown["rank"] == (likeliest.index(int(key)) + 1 if int(key) in likeliest else None)


def test_prompt_logprobs_are_vllms(client: openai.OpenAI, tokenizer: Tokenizer, model: torch.nn.Module) -> None:
    ids = tokenizer.encode(TEXT)
    reply = client.completions.create(
        model=MODEL, prompt=[TEXT, ids[:9]], max_tokens=2, n=2, temperature=0, extra_body={"prompt_logprobs": 2}
    )
    expected = pytorch(model, ids)
    tables: Any = reply.choices[0].to_dict()["prompt_logprobs"]
    assert "largest city in Japan" in "".join(next(iter(table.values()))["decoded_token"] for table in tables[1:])
    for index, choice in enumerate(reply.choices):
        assert choice.logprobs is None
        prompt = ids if index < 2 else ids[:9]
        check_ranked(choice.to_dict()["prompt_logprobs"], prompt, expected)  # type: ignore[arg-type]


def test_a_chats_prompt_logprobs_are_those_of_its_template(
    server: Server, client: openai.OpenAI, model: torch.nn.Module
) -> None:
    ids = post(server, "/tokenize", {"messages": CHAT})[1]["tokens"]
    reply = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "a"}], max_tokens=1, extra_body={"prompt_logprobs": 2}
    ).to_dict()
    check_ranked(reply["prompt_logprobs"], ids, pytorch(model, ids))  # type: ignore[arg-type]
    assert (
        "prompt_logprobs"
        not in client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "a"}], max_tokens=1
        ).to_dict()
    )


def test_echo_and_prompt_logprobs_have_their_own_numbers_of_alternatives(server: Server) -> None:
    choice = complete(server, prompt=TEXT, max_tokens=0, echo=True, logprobs=1, prompt_logprobs=4)["choices"][0]
    assert {len(top) for top in choice["logprobs"]["top_logprobs"][1:]} <= {1, 2}
    assert {len(table) for table in choice["prompt_logprobs"][1:]} <= {4, 5}
    plain = complete(server, prompt=TEXT, max_tokens=0, prompt_logprobs=0)["choices"][0]
    assert {len(table) for table in plain["prompt_logprobs"][1:]} == {1}
    own = [next(iter(table.values()))["logprob"] for table in choice["prompt_logprobs"][1:]]
    assert own == choice["logprobs"]["token_logprobs"][1:]


def test_prompt_logprobs_do_not_stream(server: Server) -> None:
    for path, asked in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", {"messages": CHAT})):
        status, document = post(server, path, {"model": MODEL, **asked, "stream": True, "prompt_logprobs": 1})
        assert (status, document["error"]["param"]) == (400, "prompt_logprobs")

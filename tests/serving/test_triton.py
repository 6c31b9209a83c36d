"""A real tritonserver on a written repository, asked by clients that are not ours: tritonclient, and HTTP as it is."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import triton_server
from command_line import succeed
from triton_server import TritonServer, running

from starling.engine import Engine

pytestmark = pytest.mark.slow

PROMPT = "The capital of France is"
ROWS = 4
TIMEOUT_S = 60


@pytest.fixture(scope="module")
def repository(demo_int8_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository") / "models"
    succeed("triton", demo_int8_bundle, folder, "--max-batch", str(ROWS), "--max-seq", "512", "--threads", "2")
    return folder


@pytest.fixture(scope="module")
def environment(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = triton_server.environment(repository)
    return triton_server.with_this_checkout(made, tmp_path_factory.mktemp("triton") / "environment")


@pytest.fixture(scope="module")
def server(repository: Path, environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with running(repository, environment, tmp_path_factory.mktemp("log") / "server.log") as started:
        yield started


@pytest.fixture(scope="module")
def expected(demo_int8_bundle: Path) -> str:
    """What the engine itself answers, greedily, with 12 tokens."""
    with Engine(demo_int8_bundle, max_seq=512, threads=2) as engine:
        return engine.generate(PROMPT, max_tokens=12).text


class GrpcStream:
    """One request on a gRPC stream of tritonclient, in a process of the server's environment."""

    def __init__(self, server: TritonServer, model: str, *, request_id: str = "", **fields: Any) -> None:
        """Send it; returns when it was sent."""
        command = [server.environment / "bin" / "python", Path(triton_server.__file__).with_name("triton_client.py")]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        asked = {"address": server.grpc, "model": model, "batch": model == "ensemble", "id": request_id}
        self._tell(json.dumps(asked | {"fields": fields}))
        assert self._reply() == {"sent": True}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Outputs by name, to the final response; raises what the server answered instead."""
        while not (reply := self._reply()).get("final"):
            if "error" in reply:
                raise Refused(reply["error"])
            yield reply["outputs"]

    def close(self, *, cancel: bool = False) -> None:
        """End the stream; with `cancel` the request too."""
        self._tell("cancel" if cancel else "stop")
        self._process.communicate(timeout=TIMEOUT_S)
        assert self._process.returncode == 0

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        reply: dict[str, Any] = json.loads(self._process.stdout.readline())
        return reply


class Refused(Exception):
    """The server's error."""


def _text(replies: list[dict[str, Any]]) -> str:
    return "".join(reply["text_output"][0] for reply in replies)


def _vllm(**settings: Any) -> str:
    return json.dumps({"temperature": 0, **settings})


def test_generate_answers_under_both_conventions(server: TritonServer, expected: str) -> None:
    ensemble = server.generate("ensemble", text_input=PROMPT, max_tokens=12, exclude_input_in_output=True)
    vllm = server.generate("vllm_model", text_input=PROMPT, sampling_parameters=_vllm(max_tokens=12))
    assert ensemble["text_output"] == expected
    assert vllm["text_output"] == PROMPT + expected  # vLLM's backend repeats the input unless told otherwise


def test_generate_stream_gives_the_text_piece_by_piece(server: TritonServer, expected: str) -> None:
    ensemble = server.events("ensemble", text_input=PROMPT, max_tokens=12, stream=True)
    vllm = server.events("vllm_model", text_input=PROMPT, stream=True, sampling_parameters=_vllm(max_tokens=12))
    for events in (ensemble, vllm):
        assert len(events) > 3
        assert "".join(event["text_output"] for event in events) == expected


def test_llmapi_answers_whole_and_in_a_stream_of_the_text_so_far(server: TritonServer, expected: str) -> None:
    asked = {"text_input": PROMPT, "sampling_param_max_tokens": 12}
    flags = {"return_finish_reason": True, "return_cumulative_logprob": True}
    answer = server.generate("tensorrt_llm", **asked, **flags, sampling_param_return_perf_metrics=True)
    assert (answer["text_output"], answer["finish_reason"]) == (expected, "length")
    assert answer["cumulative_logprob"] < 0
    moments = [answer[f"{name}_time_ns"] for name in ("arrival", "first_scheduled", "first_token", "last_token")]
    assert moments == sorted(moments)
    assert 0 < moments[-1] - moments[0] < 60e9
    assert abs(time.monotonic_ns() - moments[-1]) < 60e9
    assert (answer["acceptance_rate"], answer["total_draft_tokens"]) == (0, 0)
    texts = [event["text_output"] for event in server.events("tensorrt_llm", **asked, streaming=True)]
    assert len(texts) > 3
    assert texts[-1] == expected
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert "finish_reason" not in server.generate("tensorrt_llm", **asked)


def test_llmapi_cancels_by_the_requests_id(server: TritonServer) -> None:
    before = server.idle_stats()
    # At this temperature any token is as likely as any other: no end token comes.
    drawn = {"sampling_param_temperature": 1000.0}
    long = {"text_input": PROMPT, "sampling_param_max_tokens": 450, "streaming": True, **drawn}
    stream = GrpcStream(server, "tensorrt_llm", request_id="mine", **long)
    other = GrpcStream(server, "tensorrt_llm", request_id="other", **long | {"sampling_param_max_tokens": 3})
    next(iter(stream))
    stop = GrpcStream(server, "tensorrt_llm", request_id="mine", text_input="", stop=True)
    with pytest.raises(Refused, match="1 request"):
        list(stop)
    stop.close()
    with pytest.raises(Refused, match="the request was cancelled"):
        list(stream)
    stream.close()
    assert len(list(other)) > 0
    other.close()
    after = server.idle_stats(timeout_s=3)
    assert after["ended"].get("cancelled", 0) == before["ended"].get("cancelled", 0) + 1
    assert after["generated_tokens"] - before["generated_tokens"] < 400
    nameless = GrpcStream(server, "tensorrt_llm", text_input="", stop=True)
    with pytest.raises(Refused, match="stop is for a request with the id"):
        list(nameless)
    nameless.close()


def test_grpc_streams_under_both_conventions(server: TritonServer, expected: str) -> None:
    ensemble = GrpcStream(server, "ensemble", text_input=PROMPT, max_tokens=12, stream=True)
    vllm = GrpcStream(server, "vllm_model", text_input=PROMPT, stream=True, sampling_parameters=_vllm(max_tokens=12))
    for stream in (ensemble, vllm):
        replies = list(stream)
        stream.close()
        assert len(replies) > 3
        assert _text(replies) == expected


def test_grpc_without_stream_gets_one_response(server: TritonServer, expected: str) -> None:
    stream = GrpcStream(server, "ensemble", text_input=PROMPT, max_tokens=12, exclude_input_in_output=True)
    replies = list(stream)
    stream.close()
    assert len(replies) == 1
    assert _text(replies) == expected


def test_tritonclient_http_reads_the_models(server: TritonServer) -> None:
    script = """if True:
        import json, sys
        import numpy as np
        import tritonclient.http as http
        client = http.InferenceServerClient(sys.argv[1])
        inputs = {one["name"]: one for one in client.get_model_metadata("ensemble")["inputs"]}
        command = http.InferInput("command", [1], "BYTES")
        command.set_data_from_numpy(np.array([b"stats"], dtype=object))
        stats = json.loads(client.infer("starling", [command]).as_numpy("answer")[0])
        print(json.dumps([inputs["max_tokens"], client.is_model_ready("vllm_model"), stats["max_batch"]]))
    """
    command = [server.environment / "bin" / "python", "-c", script, server.http]
    printed = json.loads(subprocess.check_output(command, text=True, timeout=TIMEOUT_S))
    assert printed == [{"name": "max_tokens", "datatype": "INT32", "shape": [-1, 1]}, True, ROWS]


def test_vllm_outputs_come_with_their_flags(server: TritonServer) -> None:
    asked = {"return_finish_reason": True, "return_num_input_tokens": True, "return_num_output_tokens": True}
    settings = _vllm(max_tokens=5, logprobs=2)
    answer = server.generate(
        "vllm_model", text_input=PROMPT, sampling_parameters=settings, return_logprobs=True, **asked
    )
    assert answer["finish_reason"] == "length"
    assert (answer["num_input_tokens"], answer["num_output_tokens"]) == (5, 5)
    tables = json.loads(answer["logprobs"])
    assert len(tables) == 5
    assert [max(one["logprob"] for one in table.values()) for table in tables] == [
        next(one["logprob"] for one in table.values() if one["rank"] == 1) for table in tables
    ]
    assert "finish_reason" not in server.generate("vllm_model", text_input=PROMPT)


def test_tensorrt_llm_log_probs_add_up(server: TritonServer) -> None:
    answer = server.generate("ensemble", text_input=PROMPT, max_tokens=5, return_log_probs=True)
    assert len(answer["output_log_probs"]) == 5
    assert answer["cum_log_probs"] == pytest.approx(sum(answer["output_log_probs"]), abs=1e-4)


def test_vllm_choices_are_the_answers_of_seed_plus_i(server: TritonServer) -> None:
    def ask(**settings: Any) -> dict[str, Any]:
        drawn = json.dumps({"temperature": 1, "max_tokens": 8} | settings)
        flags = {"return_num_output_tokens": True, "return_num_input_tokens": True, "return_cumulative_logprob": True}
        asked = {"text_input": PROMPT, "sampling_parameters": drawn, "exclude_input_in_output": True} | flags
        return server.generate("vllm_model", **asked)

    alone = [ask(seed=3 + i) for i in range(6)]
    together = ask(seed=3, n=6, cache_salt="mine")  # more than there are rows
    for name in ("text_output", "num_output_tokens", "cumulative_logprob"):
        assert together[name] == [one[name] for one in alone]
    assert together["num_input_tokens"] == alone[0]["num_input_tokens"]
    assert len(set(together["text_output"])) > 1
    settings = json.dumps({"temperature": 1, "max_tokens": 8, "seed": 3, "n": 3})
    events = server.events("vllm_model", text_input=PROMPT, stream=True, sampling_parameters=settings)
    pieces = zip(*(event["text_output"] for event in events), strict=True)
    assert ["".join(each) for each in pieces] == [one["text_output"] for one in alone[:3]]


def test_a_seed_repeats_a_draw(server: TritonServer) -> None:
    drawn = [
        server.generate("ensemble", text_input=PROMPT, max_tokens=12, top_k=50, temperature=1.5, random_seed=seed)
        for seed in (3, 3, 4)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_stop_word_that_tokens_cut_ends_the_text_and_is_not_shown(server: TritonServer, expected: str) -> None:
    word = expected[3:9]  # it begins and ends inside tokens
    assert word in expected
    before = expected[: expected.index(word)]
    fields = {"text_input": PROMPT, "max_tokens": 12, "stop_words": [word, "never said"]}
    events = server.events("ensemble", **fields, stream=True)
    assert "".join(event["text_output"] for event in events) == before
    answer = server.generate("ensemble", **fields, exclude_input_in_output=True)
    assert answer["text_output"] == before
    settings = _vllm(max_tokens=12, stop=[word])
    answer = server.generate("vllm_model", text_input=PROMPT, sampling_parameters=settings, return_finish_reason=True)
    assert (answer["text_output"], answer["finish_reason"]) == (PROMPT + before, "stop")


def test_characters_of_several_tokens_arrive_whole(server: TritonServer, demo_int8_bundle: Path) -> None:
    prompt = "Emoji: 😀 😃 😄 😁 😆 😅 😂 🤣 😊 日本語 ありがとう 😀 😃 😄 😁"
    with Engine(demo_int8_bundle, max_seq=512, threads=2) as engine:
        expected = engine.generate(prompt, max_tokens=24)
    assert len(expected.tokens) > len(expected.text.replace(" ", ""))  # several tokens a character
    events = server.events("ensemble", text_input=prompt, max_tokens=24, stream=True)
    texts = [event["text_output"] for event in events]
    assert "".join(texts) == expected.text
    assert sum("\N{REPLACEMENT CHARACTER}" in text for text in texts[:-1]) == 0


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        ("ensemble", {"embedding_bias_words": "x"}, "embedding_bias_words is 'x', which is not supported"),
        ("ensemble", {"presence_penalty": 2.5}, "presence_penalty is 2.5"),
        ("ensemble", {"beam_width": 2}, "beam_width is 2, which is not supported: leave it out or give 1"),
        ("ensemble", {"top_p": 1.5}, "top_p is 1.5"),
        ("ensemble", {"repetition_penalty": -1.0}, "repetition_penalty is -1.0"),
        ("ensemble", {"mx_tokens": 5}, "mx_tokens is no input of this model"),
        ("ensemble", {"seed": 1, "random_seed": 2}, "seed is 1 and random_seed 2"),
        ("tensorrt_llm", {"sampling_param_top_p": 1.5}, "sampling_param_top_p is 1.5"),
        ("tensorrt_llm", {"lora_name": "x"}, "lora_name is 'x', which is not supported"),
        ("tensorrt_llm", {"max_tokens": 5}, "max_tokens is no input of this model"),
        ("vllm_model", {"sampling_parameters": "{"}, "sampling_parameters is not JSON"),
        ("vllm_model", {"sampling_parameters": '{"n": 129}'}, "sampling_parameters: n is 129: give 1 to 128"),
        ("vllm_model", {"sampling_parameters": '{"tools": []}'}, "tools is about chats"),
        ("ensemble", {"max_tokens": 1, "messages": "[]"}, "messages is about chats"),
        ("vllm_model", {"sampling_parameters": '{"temp": 2}'}, "sampling_parameters: temp is no setting"),
        ("vllm_model", {"temperature": -1}, "sampling_parameters: temperature is -1"),
        ("vllm_model", {"image": "aGk="}, "image is 'aGk=', which is not supported"),
        ("vllm_model", {"text_input": "x " * 600}, "prompt"),
        ("vllm_model", {"text_input": ""}, "text_input is empty"),
    ],
)
def test_a_bad_field_is_refused_by_its_name(
    server: TritonServer, model: str, fields: dict[str, Any], message: str
) -> None:
    required = {"text_input": PROMPT, **({"max_tokens": 4} if model == "ensemble" else {})}
    assert message in server.refusal(model, **{**required, **fields})


def test_text_that_is_not_utf8_is_refused(server: TritonServer) -> None:
    stream = GrpcStream(server, "vllm_model", text_input={"hex": "fffe"})
    with pytest.raises(Refused, match="text_input is not UTF-8: invalid start byte at byte 0"):
        list(stream)
    stream.close()


def test_cancelling_a_grpc_stream_frees_the_row(server: TritonServer) -> None:
    before = server.idle_stats()
    stream = GrpcStream(server, "ensemble", text_input=PROMPT, max_tokens=500, end_id=-1, stream=True)
    next(iter(stream))
    stream.close(cancel=True)
    after = server.idle_stats(timeout_s=3)  # the rest would take longer
    assert after["ended"].get("cancelled", 0) == before["ended"].get("cancelled", 0) + 1
    assert after["generated_tokens"] - before["generated_tokens"] < 400


def test_a_dropped_http_connection_frees_the_row(server: TritonServer) -> None:
    before = server.idle_stats()
    with _raw_stream(server, max_tokens=500) as connection:
        assert b"text_output" in connection.recv(65536) + connection.recv(65536)
    after = server.idle_stats(timeout_s=3)
    assert after["ended"].get("cancelled", 0) == before["ended"].get("cancelled", 0) + 1


def _raw_stream(server: TritonServer, **fields: Any) -> socket.socket:
    """A connection on which generate_stream was asked for, to be dropped at will."""
    host, _, port = server.http.rpartition(":")
    body = json.dumps({"text_input": PROMPT, "stream": True, "end_id": -1, **fields}).encode()
    connection = socket.create_connection((host, int(port)), timeout=TIMEOUT_S)
    head = f"POST /v2/models/ensemble/generate_stream HTTP/1.1\r\nHost: [::1]\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def test_mixed_requests_with_cancellations_all_end_and_the_figures_come_out_even(server: TritonServer) -> None:
    before = server.idle_stats()
    with ThreadPoolExecutor(10) as pool:
        outcomes = list(pool.map(lambda seed: _one_of_many(server, seed), range(30)))
    assert set(outcomes) == {"answered", "cancelled", "refused"}
    after = server.idle_stats()
    submitted = after["submitted"] - before["submitted"]
    ended = sum(after["ended"].values()) - sum(before["ended"].values())
    # One that is cancelled at once may never reach the engine.
    assert outcomes.count("answered") <= submitted == ended <= 30 - outcomes.count("refused")
    total = sum(after["ended"].values())
    _eventually(lambda: _successes(server.metrics()) == _observed(server.metrics()) == total)
    metrics = server.metrics()
    label = '{engine="0",model_name="starling"}'
    assert metrics[f"vllm:generation_tokens_total{label}"] == after["generated_tokens"]
    assert metrics[f"vllm:prompt_tokens_total{label}"] == after["prompt_tokens"]
    assert metrics[f"vllm:num_requests_running{label}"] == metrics[f"vllm:num_requests_waiting{label}"] == 0
    # Requests that nobody waited for to the end are observed like the others.
    assert metrics[f"vllm:request_generation_tokens_sum{label}"] == after["generated_tokens"]
    assert metrics[f"vllm:time_to_first_token_seconds_count{label}"] > 0
    assert metrics[f"vllm:e2e_request_latency_seconds_count{label}"] > 0


def _one_of_many(server: TritonServer, seed: int) -> str:
    choice = random.Random(seed)
    fields = {"text_input": " ".join(["word"] * choice.randint(1, 60)), "max_tokens": choice.randint(1, 24)}
    kind = seed % 3
    if kind == 0:
        assert "beam_width" in server.refusal("ensemble", **fields, beam_width=3)
        return "refused"
    if kind == 1:
        settings = _vllm(max_tokens=fields["max_tokens"])
        server.generate("vllm_model", text_input=fields["text_input"], sampling_parameters=settings)
        return "answered"
    stream = GrpcStream(server, "ensemble", **{**fields, "max_tokens": 300}, end_id=-1, stream=True)
    time.sleep(choice.random() / 2)
    stream.close(cancel=True)
    return "cancelled"


def _successes(metrics: dict[str, float]) -> float:
    return sum(value for name, value in metrics.items() if name.startswith("vllm:request_success_total"))


def _observed(metrics: dict[str, float]) -> float:
    return metrics['vllm:request_generation_tokens_count{engine="0",model_name="starling"}']


def _eventually(holds: Any, timeout_s: float = 5) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_killed_stubs_and_servers_leave_nothing_that_stops_a_restart(
    repository: Path, environment: Path, tmp_path: Path, expected: str
) -> None:
    with running(repository, environment, tmp_path / "first.log") as first:
        stream = GrpcStream(
            first, "vllm_model", text_input=PROMPT, sampling_parameters=_vllm(max_tokens=400, ignore_eos=True)
        )
        _eventually(lambda: first.stats()["running"] == 1)
        os.kill(first.stub_pid("starling"), signal.SIGKILL)
        with pytest.raises(Refused, match="the engine's process ended before the answer did"):
            list(stream)
        stream.close()
        again = GrpcStream(first, "ensemble", text_input=PROMPT, max_tokens=4)
        with pytest.raises(Refused, match="the engine's process is not running"):
            list(again)
        again.close()
        stubs = [first.stub_pid(model) for model in ("ensemble", "vllm_model")]
        first.end(signal.SIGKILL)
    _eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in stubs), timeout_s=10)
    with running(repository, environment, tmp_path / "second.log") as second:
        answer = second.generate("ensemble", text_input=PROMPT, max_tokens=12, exclude_input_in_output=True)
        assert answer["text_output"] == expected


def test_a_killed_entry_frees_its_rows(repository: Path, environment: Path, tmp_path: Path) -> None:
    with running(repository, environment, tmp_path / "server.log") as server:
        with _raw_stream(server, max_tokens=500) as connection:
            assert connection.recv(100)
            assert server.stats()["running"] == 1
            os.kill(server.stub_pid("ensemble"), signal.SIGKILL)
        assert server.idle_stats(timeout_s=3)["ended"] == {"cancelled": 1}
        assert server.generate("vllm_model", text_input=PROMPT)["text_output"].startswith(PROMPT)

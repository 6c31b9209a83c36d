"""Comparing with other runtimes: same prompts, fair turns, honest ratios, and one line where a peer fails."""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tokenizers
from click.testing import CliRunner

from starling.engine.errors import BackendError
from starling.engine.tokenizer import Tokenizer
from starling.profiling.peers.compare import main
from starling.profiling.peers.measure import Run, to_run, turns
from starling.profiling.peers.precision import graph_precision
from starling.profiling.peers.process import WorkerProcess
from starling.profiling.peers.summary import summarize
from starling.profiling.peers.worker import serve
from starling.profiling.prompts import SENTENCES, prompt_tokens


class Counting:
    """A runtime whose model continues a prompt by counting on from its last token."""

    def open(self, model: str, threads: int, capacity: int) -> dict[str, str]:
        if threads != 2:
            raise ValueError("two threads\nor none")
        return {"counting": "1.0"}

    def start(self, prompt: list[int], new_tokens: int) -> Iterator[int]:
        return (prompt[-1] + step for step in range(1, new_tokens + 1))


def exchange(*requests: dict[str, Any]) -> list[dict[str, Any]]:
    replies = io.StringIO()
    serve(Counting(), io.StringIO("".join(json.dumps(request) + "\n" for request in requests)), replies)
    return [json.loads(line) for line in replies.getvalue().splitlines()]


def made_run(contender: str, repeat: int, ttft_ms: float, itl_ms: list[float], tokens: list[int]) -> Run:
    reply = {"setup_ms": 0.0, "ttft_ms": ttft_ms, "itl_ms": itl_ms, "tokens": tokens, "peak_rss_bytes": None}
    return to_run(contender, 128, repeat, reply, others_cpu_ms=0.0)


class TestWorkerProtocol:
    def test_a_run_reports_its_tokens_and_one_gap_less(self) -> None:
        opened, ran = exchange(
            {"op": "open", "model": "m", "threads": 2, "capacity": 8},
            {"op": "run", "prompt": [5, 7], "new_tokens": 4},
        )
        assert opened["versions"] == {"python": sys.version.split()[0], "counting": "1.0"}
        assert ran["tokens"] == [8, 9, 10, 11]
        assert len(ran["itl_ms"]) == 3
        assert ran["ttft_ms"] > 0

    def test_a_failed_request_is_one_line_and_the_next_is_still_answered(self) -> None:
        failed, unknown, cpu = exchange(
            {"op": "open", "model": "m", "threads": 3, "capacity": 8}, {"op": "fly"}, {"op": "cpu"}
        )
        assert failed == {"error": "ValueError: two threads or none"}
        assert unknown == {"error": "ValueError: unknown op 'fly'"}
        assert cpu["cpu_ms"] > 0


class TestWorkerProcess:
    def test_an_environment_without_the_peer_is_named_with_the_reason(self) -> None:
        with (
            WorkerProcess("genai int8", sys.executable, "genai_worker") as process,
            pytest.raises(BackendError, match=r"genai int8: .*exit code 1, .*No module named 'onnxruntime_genai'"),
        ):
            process.request(op="cpu")

    def test_a_python_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(BackendError, match=r"genai: cannot start .*no-python"):
            WorkerProcess("genai", str(tmp_path / "no-python"), "genai_worker")

    def test_our_worker_answers_and_passes_the_engines_own_line_on(self, tmp_path: Path) -> None:
        with WorkerProcess("starling", sys.executable, "starling_worker") as process:
            assert process.request(op="cpu")["cpu_ms"] > 0
            with pytest.raises(BackendError, match=r"starling: open failed with BundleError: .*nothing-here"):
                process.request(op="open", model=str(tmp_path / "nothing-here"), threads=1, capacity=8)


class TestSummary:
    def test_ratios_are_medians_of_pairs_of_the_same_repeat(self) -> None:
        # The machine slows down threefold on the way: medians of each side alone would compare different weathers.
        runs = []
        for repeat, slow in enumerate((1.0, 2.0, 3.0)):
            runs.append(made_run("ours", repeat, 100 * slow, [10 * slow] * 4, [1, 2, 3, 4, 5]))
            runs.append(made_run("peer", repeat, 200 * slow, [15 * slow] * 4, [1, 2, 3, 4, 5]))
        ours, peer = summarize(runs, "ours")
        assert (ours.decode_ratio, ours.ttft_ratio) == (1.0, 1.0)
        assert peer.decode_ratio == pytest.approx(1.5)
        assert peer.ttft_ratio == pytest.approx(0.5)
        assert peer.decode_tokens_per_s == pytest.approx(1000 / 30)

    def test_decode_speed_leaves_the_first_token_out_and_p99_sees_the_slow_one(self) -> None:
        run = made_run("ours", 0, 500.0, [10.0] * 99 + [1000.0], [0] * 101)
        assert run.decode_tokens_per_s == pytest.approx(100 * 1000 / (990 + 1000))
        assert run.itl_p50_ms == 10
        assert run.itl_p99_ms == pytest.approx(np.percentile([10.0] * 99 + [1000.0], 99))

    def test_greedy_tokens_are_compared_within_each_repeat(self) -> None:
        runs = [
            made_run("peer", 0, 1.0, [1.0, 1.0], [4, 5, 6]),
            made_run("ours", 0, 1.0, [1.0, 1.0], [4, 5, 6]),
            made_run("ours", 1, 1.0, [1.0, 1.0], [7, 8, 9]),
            made_run("peer", 1, 1.0, [1.0, 1.0], [7, 0, 9]),
        ]
        assert summarize(runs, "ours")[0].first_difference == (None, 1)


def test_every_second_repeat_runs_in_the_opposite_order() -> None:
    workers: Any = ["a", "b", "c"]
    assert ["".join(map(str, turns(workers, repeat))) for repeat in range(3)] == ["abc", "cba", "abc"]


def test_prompts_have_the_exact_length_and_no_common_beginning() -> None:
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    model = tokenizers.models.WordLevel({word: index for index, word in enumerate(["?", *words])}, unk_token="?")
    core = tokenizers.Tokenizer(model)
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = Tokenizer(core, {})
    prompts = [prompt_tokens(tokenizer, 1000, start) for start in range(-1, 5)]
    assert {len(prompt) for prompt in prompts} == {1000}
    assert len({tuple(prompt[:4]) for prompt in prompts}) == len(prompts)
    assert tokenizer.decode(prompts[1][:3]) == "A lighthouse keeper"


def test_precision_is_read_from_the_graph(tmp_path: Path) -> None:
    helper = onnx.helper
    nodes = [
        helper.make_node("Gather", ["embedding", "ids"], ["x"]),
        helper.make_node("MatMul", ["x", "x"], ["scores"]),
        helper.make_node("MatMul", ["x", "projection"], ["y"]),
        helper.make_node(
            "MatMulNBits", ["y", "packed", "scales"], ["z"], domain="com.microsoft", bits=8, block_size=32, K=32, N=1
        ),
    ]
    weights = [
        onnx.numpy_helper.from_array(np.zeros(shape, dtype), name)
        for name, shape, dtype in (
            ("embedding", (4, 32), np.float16),
            ("projection", (32, 32), np.float32),
            ("packed", (1, 1, 32), np.uint8),
            ("scales", (1,), np.float32),
        )
    ]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [], [], weights)), tmp_path / "m.onnx")
    # The product of two activations counts for nothing: it has no weight.
    assert graph_precision(tmp_path / "m.onnx") == {
        "Gather float16": 1,
        "MatMul float32": 1,
        "MatMulNBits 8 bit block 32 symmetric": 1,
    }


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["no-bundle"], r"no-bundle"),
        (["no-bundle", "--output", "no/folder/out.json"], r"no/folder is no folder; choose another --output"),
        (["no-bundle", "--prompt-tokens", "128,many"], r"'128,many' is not a list of numbers"),
        (["no-bundle", "--prompt-tokens", "0"], r"0 is not a prompt length"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(arguments: list[str], line: str) -> None:
    result = CliRunner().invoke(main, [*arguments, "--peer-python", sys.executable, "--bundle-in-peer"])
    assert result.exit_code == 2
    assert line in result.stderr
    assert "Traceback" not in result.output

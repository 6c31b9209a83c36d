"""Comparing with other runtimes: same prompts, fair turns, honest ratios, and one line where a peer fails."""

import io
import json
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tokenizers
from click.testing import CliRunner

from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import BackendError, UserError
from starling.engine.text.tokenizer import Tokenizer
from starling.profiling.exact_prompts import SENTENCES, prompt_tokens
from starling.profiling.peers.chart import comparison_chart
from starling.profiling.peers.compare import chosen, main
from starling.profiling.peers.contenders import Contender, by_precision, in_genai, our_contenders
from starling.profiling.peers.graph_precision import graph_precision
from starling.profiling.peers.measure import Run, measure, to_run, turns
from starling.profiling.peers.peer_divergence import reference_of, score
from starling.profiling.peers.peers_file import read_peers, write_peers
from starling.profiling.peers.summary import summarize
from starling.profiling.peers.worker_process import WorkerProcess
from starling.profiling.peers.workers.worker import Arrived, Feed, Setup, serve
from starling.profiling.quality.stored_logits import StoredLogits

VOCABULARY = 32


class Counting:
    """A runtime whose model continues a prompt by counting on from its last token."""

    def open(self, setup: Setup) -> dict[str, str]:
        if setup.threads != 2:
            raise ValueError("two threads\nor none")
        return {"counting": "1.0"}

    def start(self, prompt: list[int], new_tokens: int) -> Callable[[Arrived], None]:
        def generate(arrived: Arrived) -> None:
            for step in range(1, new_tokens + 1):
                arrived(prompt[-1] + step)

        return generate

    def begin(self) -> Feed:
        return lambda tokens: 9 * np.eye(VOCABULARY)[(tokens[-1] + 1) % VOCABULARY]


def exchange(*requests: dict[str, Any]) -> list[dict[str, Any]]:
    replies = io.StringIO()
    serve(Counting(), io.StringIO("".join(json.dumps(request) + "\n" for request in requests)), replies)
    return [json.loads(line) for line in replies.getvalue().splitlines()]


def made_run(contender: str, repeat: int, ttft_ms: float, itl_ms: list[float], tokens: list[int]) -> Run:
    reply = {"setup_ms": 0.0, "ttft_ms": ttft_ms, "itl_ms": itl_ms, "tokens": tokens, "peak_rss_bytes": 10 + repeat}
    return to_run(contender, 128, repeat, reply, others_cpu_ms=0.0)


def made_contender(name: str, precision: str, peer: str = "peer", worker: str = "hf_worker") -> Contender:
    return Contender(name, peer, precision, Path("/p/env/bin/python"), worker, Path("/p/models/m"), "cpu", {"a": 1})


OPEN = {"op": "open", "model": "m", "capacity": 8, "device": "cpu", "settings": {}}


class TestWorkerProtocol:
    def test_a_run_reports_its_tokens_and_one_gap_less(self) -> None:
        opened, ran = exchange(OPEN | {"threads": 2}, {"op": "run", "prompt": [5, 7], "new_tokens": 4})
        assert opened["versions"] == {"python": sys.version.split()[0], "counting": "1.0"}
        assert ran["tokens"] == [8, 9, 10, 11]
        assert len(ran["itl_ms"]) == 3
        assert ran["ttft_ms"] > 0

    def test_a_failed_request_is_one_line_and_the_next_is_still_answered(self) -> None:
        failed, unknown, cpu = exchange(OPEN | {"threads": 3}, {"op": "fly"}, {"op": "cpu"})
        assert failed == {"error": "ValueError: two threads or none"}
        assert unknown == {"error": "ValueError: unknown op 'fly'"}
        assert cpu["cpu_ms"] > 0

    def test_logits_are_those_after_each_token_from_the_last_of_the_context_on(self, tmp_path: Path) -> None:
        rows, file = [[4, 9, 9, 1, 2], [7, 7, 3, 3, 3]], tmp_path / "logits.npz"
        (reply,) = exchange({"op": "logits", "tokens": rows, "context": 2, "file": str(file)})
        assert reply == {"shape": [2, 3, VOCABULARY]}
        stored = StoredLogits.read(file)
        assert stored.context == 2
        assert stored.tokens.tolist() == rows
        assert stored.logits.dtype == np.float32
        assert stored.logits.argmax(axis=2).tolist() == [[10, 10, 2], [8, 4, 4]]


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
                process.request(**OPEN | {"threads": 1, "model": str(tmp_path / "nothing-here")})


class TestSummary:
    def test_ratios_are_medians_of_pairs_of_the_same_repeat(self) -> None:
        # The machine slows down threefold on the way: medians of each side alone would compare different weathers.
        runs = []
        for repeat, slow in enumerate((1.0, 2.0, 3.0)):
            runs.append(made_run("ours", repeat, 100 * slow, [10 * slow] * 4, [1, 2, 3, 4, 5]))
            runs.append(made_run("peer", repeat, 200 * slow, [15 * slow] * 4, [1, 2, 3, 4, 5]))
        ours, peer = summarize(runs, {"fp32": ["ours", "peer"]})
        assert (ours.decode_ratio, ours.ttft_ratio) == (1.0, 1.0)
        assert peer.decode_ratio == pytest.approx(1.5)
        assert peer.ttft_ratio == pytest.approx(0.5)
        assert peer.decode_tokens_per_s == pytest.approx(1000 / 30)
        assert peer.peak_rss_bytes == 12

    def test_each_precision_is_compared_with_ours_of_the_same(self) -> None:
        times = {"ours fp32": 20.0, "peer fp32": 40.0, "ours int8": 10.0, "peer int8": 8.0}
        runs = [made_run(name, 0, ms, [ms, ms], [1, 2, 3]) for name, ms in times.items()]
        groups = {"fp32": ["ours fp32", "peer fp32"], "int8": ["ours int8", "peer int8"]}
        found = {(row.precision, row.contender): row.decode_ratio for row in summarize(runs, groups)}
        assert found["fp32", "peer fp32"] == pytest.approx(2.0)
        assert found["int8", "peer int8"] == pytest.approx(0.8)

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
        assert summarize(runs, {"fp32": ["ours", "peer"]})[1].first_difference == (None, 1)


class TestWhoTakesPart:
    def test_a_peer_is_grouped_with_our_bundle_of_its_precision_and_left_out_without_one(
        self, tiny_bundle: Path
    ) -> None:
        ours = our_contenders([Bundle.open(tiny_bundle)], "cpu")
        assert [(one.name, one.precision, one.device) for one in ours] == [("starling fp32", "fp32", "cpu")]
        groups = by_precision(ours, [made_contender("a fp32", "fp32"), made_contender("a int8", "int8")])
        assert {name: [one.name for one in group] for name, group in groups.items()} == {
            "fp32": ["starling fp32", "a fp32"]
        }
        with pytest.raises(UserError, match="no peer has a model in fp32"):
            by_precision(ours, [made_contender("a int8", "int8")])

    def test_two_bundles_of_one_precision_are_told_apart_by_their_folders(
        self, tiny_bundle: Path, tmp_path: Path
    ) -> None:
        other = shutil.copytree(tiny_bundle, tmp_path / "other")
        ours = our_contenders([Bundle.open(tiny_bundle), Bundle.open(other)], "cpu")
        assert [one.name for one in ours] == ["starling tiny", "starling other"]
        with pytest.raises(UserError, match="2 contenders are called 'starling tiny'"):
            our_contenders([Bundle.open(tiny_bundle)] * 2, "cpu")

    def test_a_choice_names_peers_or_single_contenders(self) -> None:
        peers = [made_contender("a fp32", "fp32", "a"), made_contender("a int8", "int8", "a")]
        peers.append(made_contender("b fp32", "fp32", "b"))
        assert chosen(peers, None) == peers
        assert [one.name for one in chosen(peers, "a int8,b")] == ["a int8", "b fp32"]
        with pytest.raises(UserError, match="'c' is not set up; there are a fp32, a int8, b fp32"):
            chosen(peers, "a,c")

    def test_our_bundle_runs_in_genai_by_the_environment_of_that_peer(self, tiny_bundle: Path) -> None:
        ours = our_contenders([Bundle.open(tiny_bundle)], "cpu")
        genai = made_contender("genai int8", "int8", "genai", "genai_worker")
        (there,) = in_genai(ours, [made_contender("a fp32", "fp32"), genai])
        assert (there.name, there.precision, there.worker) == ("genai, starling fp32", "fp32", "genai_worker")
        assert (there.python, there.model) == (genai.python, tiny_bundle.resolve())
        with pytest.raises(UserError, match="onnxruntime-genai is not among the peers"):
            in_genai(ours, [made_contender("a fp32", "fp32")])

    def test_the_reference_of_quality_is_pytorch_before_our_own_fp32(self, tiny_bundle: Path) -> None:
        ours = our_contenders([Bundle.open(tiny_bundle)], "cpu")
        torch = made_contender("transformers fp32", "fp32", "transformers")
        assert reference_of(ours, [made_contender("a fp32", "fp32"), torch]) == torch
        assert reference_of(ours, [made_contender("a fp32", "fp32")]) == ours[0]
        assert reference_of([], [made_contender("a fp32", "fp32")]) is None


class TestPeersFile:
    def test_it_can_be_moved_with_its_folder(self, tmp_path: Path) -> None:
        old, new = tmp_path / "old", tmp_path / "new"
        listed = [made_contender("a fp32", "fp32"), made_contender("a int8", "int8")]
        old.mkdir()
        write_peers(old, [_moved(one, old) for one in listed])
        old.rename(new)
        assert read_peers(new) == [_moved(one, new) for one in listed]

    @pytest.mark.parametrize(
        ("content", "line"),
        [
            (None, r"peers.json cannot be read .*starling.profiling.peers.install"),
            ("{", r"peers.json is broken"),
            ('{"format": "starling-peers", "format_version": 9, "contenders": []}', r"another format or version"),
            ('{"format": "starling-peers", "format_version": 1, "contenders": [{}]}', r"peers.json is broken"),
        ],
    )
    def test_one_that_cannot_be_read_says_what_to_do(self, tmp_path: Path, content: str | None, line: str) -> None:
        if content is not None:
            (tmp_path / "peers.json").write_text(content)
        with pytest.raises(UserError, match=line):
            read_peers(tmp_path)


def _moved(contender: Contender, folder: Path) -> Contender:
    python, model = (folder / path.relative_to("/p") for path in (contender.python, contender.model))
    return replace(contender, python=python, model=model)


class TestQuality:
    def test_equal_logits_diverge_by_nothing_and_others_by_their_kl(self) -> None:
        tokens = np.array([[0, 1, 2, 3]])
        logits = np.zeros((1, 2, 4), np.float32)
        same = score(StoredLogits(tokens, 2, logits), StoredLogits(tokens, 2, logits))
        assert same.positions == 2
        assert same.perplexity == pytest.approx(4)
        assert same.divergence is not None
        assert same.divergence.mean_kl == 0
        other = logits.copy()
        other[0, 0, 0] = np.log(5)  # the first position's distribution becomes 5/8, 1/8, 1/8, 1/8
        far = score(StoredLogits(tokens, 2, other), StoredLogits(tokens, 2, logits)).divergence
        assert far is not None
        expected = 0.25 * (np.log(0.25 / (5 / 8)) + 3 * np.log(0.25 / (1 / 8)))
        assert far.mean_kl == pytest.approx(expected / 2)
        assert far.max_kl == pytest.approx(expected)

    def test_logits_of_another_text_are_refused(self) -> None:
        logits = np.zeros((1, 2, 4), np.float32)
        with pytest.raises(UserError, match="the stored logits are of"):
            score(StoredLogits(np.array([[1, 2, 3, 4]]), 2, logits), StoredLogits(np.array([[1, 2, 3, 5]]), 2, logits))


class TestMeasuring:
    def test_every_second_repeat_runs_in_the_opposite_order(self) -> None:
        workers: Any = ["a", "b", "c"]
        assert ["".join(map(str, turns(workers, repeat))) for repeat in range(3)] == ["abc", "cba", "abc"]

    def test_no_two_prompts_of_a_process_begin_alike_and_all_contenders_get_the_same(self) -> None:
        # A runtime that caches prefixes would else answer the long prompt out of the short one.
        asked: list[int] = []

        def prompts(length: int, start: int) -> list[int]:
            asked.append(start % len(SENTENCES))
            return [start % len(SENTENCES)] * length

        with WorkerProcess("a", sys.executable, "starling_worker") as idle:
            assert measure([], prompts, [8, 16], 4, range(2, 4), lambda text: None) == []
            assert idle.request(op="cpu")["cpu_ms"] > 0
        assert len(set(asked)) == len(asked) == 4


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


def test_the_chart_is_one_drawing_with_a_bar_for_every_contender_the_fastest_first() -> None:
    times = {"starling int8": 10.0, "genai int8": 8.0, "llama.cpp Q8_0": 16.0}
    runs = [made_run(name, 0, 3 * ms, [ms, ms], [1, 2, 3]) for name, ms in times.items()]
    rows = summarize(runs, {"int8": list(times)})
    document = {
        "environment": {"machine": {"cpu": "A <fast> one"}, "created": "2026-01-02T03:04:05+00:00"},
        "plan": {"threads": 2, "new_tokens": 3, "rounds": 1, "repeats": 1},
        "bundles": [{"source": {"name": "model"}}],
        "summaries": [
            {name: getattr(row, name) for name in ("contender", "precision", "prompt_tokens", "ttft_ms")}
            | {"decode_tokens_per_s": row.decode_tokens_per_s}
            for row in rows
        ],
        "quality": {"genai int8": {"divergence": {"mean_kl": 0.00391}}},
    }
    drawing = ElementTree.fromstring(comparison_chart(document))
    texts = [element.text or "" for element in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert [text for text in texts if text in times] == ["genai int8", "starling int8", "llama.cpp Q8_0"]
    assert "int8, 128 prompt tokens" in texts
    assert {"125.0", "100.0", "62.5", "24", "30", "48", "0.0039"} <= set(texts)
    bars = [e for e in drawing.iter("{http://www.w3.org/2000/svg}rect") if "bar" in str(e.get("class"))]
    assert len(bars) == 6
    assert sum(bar.get("class") == "bar us" for bar in bars) == 2


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
    result = CliRunner().invoke(main, [*arguments, "--peers", "no-peers"])
    assert result.exit_code == 2
    assert line in result.stderr
    assert "Traceback" not in result.output

"""Servers under load: prompts that are shared or not, what a reader of streams sees, honest figures, and refusals."""

import io
import json
import sys
import threading
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import combinations
from pathlib import Path

import pytest
from click.testing import CliRunner

from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import BackendError, UserError
from starling.engine.text.tokenizer import Tokenizer
from starling.profiling.load.peer_servers import Plan, main, measure, serving_contenders
from starling.profiling.load.servers.event_streams import read_at_once
from starling.profiling.load.servers.server_chart import load_chart
from starling.profiling.load.servers.server_loads import LONGEST, OWN, PREFIX, UNSHARED, Load, loads, prompts_of
from starling.profiling.load.servers.server_process import Stream
from starling.profiling.load.servers.server_summary import (
    LoadRun,
    LoadSummary,
    alike,
    load_run,
    load_tables,
    summarize_loads,
)
from starling.profiling.peers.contenders import Contender, our_contenders
from starling.profiling.peers.peers_file import write_peers
from starling.profiling.peers.workers.worker import serve


@pytest.fixture(scope="module")
def tokenizer(tiny_bundle: Path) -> Tokenizer:
    bundle = Bundle.open(tiny_bundle)
    return Tokenizer.load(bundle.folder, bundle.architecture.vocab_size)


class TestPrompts:
    def test_unshared_prompts_differ_from_their_first_words_on(self, tokenizer: Tokenizer) -> None:
        found = [prompts_of(Load("unshared", 16), tokenizer, draw) for draw in range(2)]
        assert all(prompts.known is None for prompts in found)
        every = [prompt for prompts in found for prompt in prompts.streams]
        assert [len(prompt) for prompt in every] == [UNSHARED] * 32
        assert max(map(shared, *zip(*combinations(every, 2), strict=True))) < 8

    def test_shared_prompts_have_the_known_ones_prefix_and_nothing_more(self, tokenizer: Tokenizer) -> None:
        first, second = (prompts_of(Load("shared", 4), tokenizer, draw) for draw in range(2))
        assert first.known is not None
        assert second.known is not None
        every = [first.known, *first.streams]
        assert [len(prompt) for prompt in every] == [LONGEST] * 5 == [PREFIX + OWN] * 5
        assert all(PREFIX <= shared(one, other) < PREFIX + 8 for one, other in combinations(every, 2))
        assert shared(first.known, second.known) < 8

    def test_a_draw_gives_the_same_prompts_again(self, tokenizer: Tokenizer) -> None:
        assert prompts_of(Load("shared", 2), tokenizer, 3) == prompts_of(Load("shared", 2), tokenizer, 3)

    def test_each_kind_comes_with_each_number_of_streams(self) -> None:
        assert loads(("unshared", "shared"), (1, 4)) == [
            Load("unshared", 1),
            Load("unshared", 4),
            Load("shared", 1),
            Load("shared", 4),
        ]


def shared(one: list[int], other: list[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@contextmanager
def answering(answer: Callable[[BaseHTTPRequestHandler, dict[str, int]], None]) -> Iterator[int]:
    """Python's own HTTP server; its port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


class TestEventStreams:
    def test_streams_run_at_once_and_an_event_counts_from_its_last_byte(self) -> None:
        together, second_sent = threading.Barrier(2, timeout=20), threading.Event()

        def answer(handler: BaseHTTPRequestHandler, body: dict[str, int]) -> None:
            together.wait()  # neither is answered before both are there
            handler.send_response(200)
            handler.send_header("Transfer-Encoding", "chunked")
            handler.end_headers()
            if body["stream"] == 1:
                second_sent.set()
            for piece in (b'data: {"n": 1}\n\nda', b'ta: {"n":', b" 2}\n\n", b"data: [DONE]\n\n", b""):
                handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                handler.wfile.flush()
                assert second_sent.wait(20)

        with answering(answer) as port:
            answers = read_at_once(port, "/any", [{"stream": 0}, {"stream": 1}])
        for events in answers:
            assert [event.data for event in events] == [{"n": 1}, {"n": 2}]
            assert 0 < events[0].ms <= events[1].ms

    def test_a_refusal_is_told_with_its_words(self) -> None:
        def refuse(handler: BaseHTTPRequestHandler, body: dict[str, int]) -> None:
            handler.send_response(429)
            handler.send_header("Content-Length", "4")
            handler.end_headers()
            handler.wfile.write(b"full")

        with answering(refuse) as port, pytest.raises(BackendError, match="status 429: b'full'"):
            read_at_once(port, "/any", [{}])

    def test_a_connection_that_ends_within_an_answer_is_told(self) -> None:
        def end(handler: BaseHTTPRequestHandler, body: dict[str, int]) -> None:
            handler.close_connection = True

        with answering(end) as port, pytest.raises(BackendError, match="cannot be read: RemoteDisconnected"):
            read_at_once(port, "/any", [{}])
        with pytest.raises(BackendError, match=f"port {port}: .*refused"):
            read_at_once(port, "/any", [{}])


def made_run(server: str, round_: int, rate: float, ms: float) -> LoadRun:
    times = {f"{kind}_{point}_ms": ms for kind in ("ttft", "itl") for point in ("p50", "p95", "p99")}
    return LoadRun(server=server, prompts="unshared", streams=4, round=round_, tokens_per_s=rate, alike=1.0, **times)


class TestFigures:
    def test_a_load_counts_all_tokens_until_the_last_piece_and_gaps_within_streams(self) -> None:
        streams = [Stream([100.0, 110.0, 130.0], 3, text="abcd"), Stream([300.0, 340.0, 500.0], 5, text="xy")]
        run = load_run("ours", Load("shared", 2), 7, streams, ["abcd", "xy"], ["abxx", "xy"])
        assert (run.server, run.prompts, run.streams, run.round) == ("ours", "shared", 2, 7)
        assert run.tokens_per_s == pytest.approx(8 / 0.5)
        assert (run.ttft_p50_ms, run.ttft_p95_ms) == (200, pytest.approx(290))
        assert run.itl_p50_ms == 30  # of 10, 20, 40 and 160
        assert run.itl_p99_ms == pytest.approx(160 - 0.03 * 120)
        assert run.alike == 0.75

    def test_alike_is_up_to_the_first_other_character(self) -> None:
        assert [alike("abcd", "abcd"), alike("abcd", "abxd"), alike("ab", "abcd"), alike("", "")] == [1, 0.5, 0.5, 0]

    def test_ratios_are_medians_of_pairs_of_one_round(self) -> None:
        # The machine slows down threefold on the way, and the peer failed in the last round.
        runs = [made_run("ours", number, 100 / slow, 10 * slow) for number, slow in enumerate((1, 2, 3, 9))]
        runs += [made_run("peer", number, 50 / slow, 40 * slow) for number, slow in enumerate((1, 2, 3))]
        ours, peer = summarize_loads(runs, "ours")
        assert (ours.tokens_ratio, ours.itl_p95_ratio) == (1, 1)
        assert (peer.tokens_ratio, peer.ttft_p95_ratio, peer.itl_p95_ratio) == (2, 0.25, 0.25)
        assert (peer.tokens_per_s, peer.ttft_p99_ms) == (25, 80)

    def test_the_tables_and_the_chart_show_every_server_of_every_load(self) -> None:
        runs = [replace(made_run(name, 0, 20, 5), streams=n) for n in (1, 4) for name in ("starling int8", "peer Q8")]
        summaries = summarize_loads(runs, "starling int8")
        tables = load_tables(summaries)
        assert [table.title for table in tables] == ["1 stream, 128 prompt tokens", "4 streams, 128 prompt tokens"]
        assert [table.row_count for table in tables] == [2, 2]
        document = {
            "bundle": {"source": {"name": "a < b"}},
            "calls": [{"environment": {"machine": {"cpu": "a cpu"}, "created": "2026-01-02T03:04:05+00:00"}}],
            "plan": {"threads": 2, "new_tokens": 64},
            "runs": [asdict(run) for run in runs],
            "summaries": [asdict(summary) for summary in summaries],
        }
        texts = [element.text for element in ElementTree.fromstring(load_chart(document)).iter()]
        assert texts.count("starling int8") == texts.count("peer Q8") == 2
        assert "a < b: servers under load" in texts


class Counting:
    """A runtime whose model continues prompts by counting on, a token of each in turn."""

    def answer_all(self, prompts: list[list[int]], new_tokens: int, arrived: Callable[[int, int], None]) -> None:
        for step in range(new_tokens):
            for number, prompt in enumerate(prompts):
                arrived(number, prompt[-1] + 1 + step)


def test_a_worker_that_batches_tells_each_streams_tokens_and_when_they_came() -> None:
    replies, request = io.StringIO(), {"op": "streams", "prompts": [[3], [1, 7]], "new_tokens": 3}
    serve(Counting(), io.StringIO(json.dumps(request) + "\n"), replies)  # type: ignore[arg-type]  # it only batches
    streams = json.loads(replies.getvalue())["streams"]
    assert [stream["tokens"] for stream in streams] == [[4, 5, 6], [8, 9, 10]]
    moments = [stream["arrivals_ms"] for stream in streams]
    assert [at for pair in zip(*moments, strict=True) for at in pair] == sorted(moments[0] + moments[1])


class TestWhatIsRefused:
    @staticmethod
    def contender(folder: Path, peer: str, precision: str = "fp32") -> Contender:
        model, python = folder / "models" / peer, folder / "env" / peer / "bin" / "python"
        return Contender(f"{peer} {precision}", peer, precision, python, "any_worker", model, "cpu")

    def test_no_peer_that_serves(self, tiny_bundle: Path, tmp_path: Path) -> None:
        others = [self.contender(tmp_path, "transformers"), self.contender(tmp_path, "openvino", "int8")]
        write_peers(tmp_path, others)
        result = CliRunner().invoke(main, [str(tiny_bundle), "--peers", str(tmp_path)])
        assert result.exit_code == 2
        assert result.stderr.startswith("error: no peer that serves several requests together has a model in fp32")
        assert "--peers llama.cpp,openvino --precisions fp32" in result.stderr

    def test_llama_cpp_without_its_server(self, tiny_bundle: Path, tmp_path: Path) -> None:
        write_peers(tmp_path, [self.contender(tmp_path, "llama.cpp")])
        result = CliRunner().invoke(main, [str(tiny_bundle), "--peers", str(tmp_path)])
        assert result.exit_code == 2
        assert "has no llama-server; run starling.profiling.peers.install again" in result.stderr
        assert len(result.stderr.splitlines()) == 1

    def test_only_those_named_take_part(self, tiny_bundle: Path, tmp_path: Path) -> None:
        peers = [self.contender(tmp_path, "llama.cpp"), self.contender(tmp_path, "openvino")]
        bundle = Bundle.open(tiny_bundle)
        assert [one.name for one in serving_contenders(bundle, peers, "openvino")] == [
            "starling fp32",
            "openvino fp32",
        ]
        with pytest.raises(UserError, match="--only 'vllm' is not set up"):
            serving_contenders(bundle, peers, "vllm")

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--add"], "--add adds to a file; name it with --output"),
            (["--output", "no/folder/out.json"], "no/folder is no folder"),
            (["--add", "--output", "{broken}"], "cannot be gone on with"),
            (["--add", "--output", "{other}"], "is of another bundle, --threads or --new-tokens"),
            (["--streams", "4,none"], "write for example 1,4,16"),
            (["--streams", "0"], "write for example 1,4,16"),
        ],
    )
    def test_options_that_cannot_be_taken(
        self, arguments: list[str], words: str, tiny_bundle: Path, tmp_path: Path
    ) -> None:
        write_peers(tmp_path, [self.contender(tmp_path, "openvino")])
        files = {"broken": tmp_path / "broken.json", "other": tmp_path / "other.json"}
        files["broken"].write_text("{", encoding="utf-8")
        other = {"format": "starling-peer-servers", "format_version": 1, "bundle": {}, "plan": {}}
        files["other"].write_text(json.dumps(other), encoding="utf-8")
        given = [argument.format(**files) for argument in arguments]
        result = CliRunner().invoke(main, [str(tiny_bundle), "--peers", str(tmp_path), *given])
        assert result.exit_code == 2
        assert words in result.stderr


@pytest.mark.slow
def test_servers_take_turns_a_failing_peer_is_named_and_a_later_call_goes_on(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    ours = our_contenders([bundle], "cpu")[0]
    again, broken = replace(ours, name="again"), replace(ours, name="broken", model=tmp_path)
    plan = Plan(prompts=("shared",), streams=(2,), new_tokens=6, threads=2, rounds=1)
    document = measure(bundle, [ours, again, broken], plan, None)
    document = json.loads(json.dumps(measure(bundle, [ours], plan, json.loads(json.dumps(document)))))
    assert [(run["server"], run["round"]) for run in document["runs"]] == [
        ("starling fp32", 0),
        ("again", 0),
        ("starling fp32", 1),
    ]
    assert [run["alike"] for run in document["runs"]] == [1.0] * 3  # the same bundle on the same tokens
    assert [(call["rounds"], list(call["servers"])) for call in document["calls"]] == [
        ([0, 0], ["starling fp32", "again"]),
        ([1, 1], ["starling fp32"]),
    ]
    assert "broken: the server ended before it was ready (exit code 2" in document["failures"]["broken"]
    for row in (LoadSummary(**each) for each in document["summaries"]):
        assert 0 < row.ttft_p50_ms <= row.ttft_p95_ms <= row.ttft_p99_ms
        assert 0 < row.tokens_per_s < 6 * 2 / (row.ttft_p50_ms / 1e3)
    command = document["calls"][0]["servers"]["again"]["command"]
    assert command[0] == Path(sys.executable).name
    assert command[command.index("--threads") + 1] == "2"

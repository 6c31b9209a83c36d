"""`starling batch`: every line answered exactly once, whatever interrupts it."""

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from command_line import document, end, refusal, running, starling, succeed
from http_server import wait_until

from starling.engine.engine import Engine
from starling.engine.generation.sampling_params import SamplingParams

pytestmark = pytest.mark.slow

FIT = ("--max-seq", "256", "--threads", "2")


def write_lines(path: Path, lines: Sequence[Any]) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def questions(path: Path, count: int, *, tokens: int = 6) -> Path:
    lines = [{"id": f"q{i}", "prompt": f"Question {i}: how many?", "max_tokens": tokens + i % 3} for i in range(count)]
    return write_lines(path, lines)


def results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_results_are_what_generate_gives(tiny_bundle: Path, tmp_path: Path) -> None:
    lines = [
        {"id": "text", "prompt": "Once upon a time", "max_tokens": 8},
        {"id": 7, "messages": [{"role": "user", "content": "Hello 😀"}], "max_tokens": 8},
        {"prompt": "No id", "max_tokens": 2, "logprobs": 1},
        {"id": "drawn", "prompt": "Once", "temperature": 1, "seed": 5, "max_tokens": 8},
    ]
    out = tmp_path / "out.jsonl"
    succeed("batch", tiny_bundle, write_lines(tmp_path / "in.jsonl", lines), out, *FIT)
    found = {record["id"]: record for record in results(out)}
    assert set(found) == {"text", 7, 3, "drawn"}
    common = ("--max-seq", "256", "--max-tokens", "8")
    expected = [
        document("generate", tiny_bundle, "--raw", "Once upon a time", *common),
        document("generate", tiny_bundle, "--chat", "Hello 😀", *common),
        document("generate", tiny_bundle, "--raw", "Once", *common, "--temperature", "1", "--seed", "5"),
    ]
    for id_, generated in zip(("text", 7, "drawn"), expected, strict=True):
        assert found[id_]["text"] == generated["results"][0]["text"]
        assert found[id_]["finish_reason"] == "length"
    assert found["text"]["usage"]["completion_tokens"] == 8
    assert len(found[3]["logprobs"]) == 2


def test_openais_batch_format_gets_openais_results(tiny_bundle: Path, tmp_path: Path) -> None:
    body = {"model": "any", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    line = {"custom_id": "a-1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    source, out = write_lines(tmp_path / "in.jsonl", [line]), tmp_path / "out.jsonl"
    for _ in range(2):
        succeed("batch", tiny_bundle, source, out, *FIT)
        [record] = results(out)
    assert record["custom_id"] == "a-1"
    assert record["response"]["status_code"] == 200
    assert record["response"]["body"]["choices"][0]["message"]["role"] == "assistant"
    assert record["response"]["body"]["usage"]["completion_tokens"] == 4


def test_choices_are_the_answers_of_seed_plus_i_in_both_forms(tiny_bundle: Path, tmp_path: Path) -> None:
    drawn = {"temperature": 1, "seed": 5, "max_tokens": 8}
    body = drawn | {"model": "any", "messages": [{"role": "user", "content": "Hi"}], "n": 3}
    lines = [
        {"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions", "body": body},
        {"id": "own", "prompt": "Once", "n": 3, **drawn},
        {"id": "many", "prompt": "Once", "n": 20, "max_tokens": 2},  # more than run and wait at once
    ]
    out = tmp_path / "out.jsonl"
    succeed("batch", tiny_bundle, write_lines(tmp_path / "in.jsonl", lines), out, *FIT, "--max-batch", "2")
    found = {record.get("custom_id", record["id"]): record for record in results(out)}
    with Engine(tiny_bundle, max_seq=256, threads=2) as engine:
        settings = [SamplingParams(max_tokens=8, temperature=1, seed=seed) for seed in (5, 6, 7)]
        alone = [engine.generate("Once", one) for one in settings]
        chats = [engine.chat().send("Hi", one) for one in settings]
    assert [choice["text"] for choice in found["own"]["choices"]] == [one.text for one in alone]
    answer = found["chat"]["response"]["body"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert texts == [one.text for one in chats]
    assert len(set(texts)) == 3
    # As over HTTP: the prompt counts once.
    assert answer["usage"]["prompt_tokens"] == chats[0].timings.prompt_tokens
    assert answer["usage"]["completion_tokens"] == 24
    assert (len(found["many"]["choices"]), found["many"]["usage"]["completion_tokens"]) == (20, 40)


def test_a_killed_batch_goes_on_and_every_result_is_there_once(tiny_bundle: Path, tmp_path: Path) -> None:
    count = 40
    source, out = questions(tmp_path / "in.jsonl", count), tmp_path / "out.jsonl"
    for wanted in (8, 20):
        with running("batch", tiny_bundle, source, out, *FIT) as process:
            assert wait_until(lambda least=wanted: out.exists() and out.read_bytes().count(b"\n") >= least, 60)
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert wanted <= out.read_bytes().count(b"\n") < count
    finished = starling("batch", tiny_bundle, source, out, *FIT)
    assert finished.returncode == 0, finished.stderr
    assert sorted(record["id"] for record in results(out)) == sorted(f"q{i}" for i in range(count))
    alone = tmp_path / "alone.jsonl"
    succeed("batch", tiny_bundle, source, alone, *FIT, "--max-batch", "1")
    texts = [{record["id"]: record["text"] for record in results(path)} for path in (out, alone)]
    assert texts[0] == texts[1]


def test_a_torn_last_line_is_cut_off_and_answered_again(tiny_bundle: Path, tmp_path: Path) -> None:
    source, out = questions(tmp_path / "in.jsonl", 4), tmp_path / "out.jsonl"
    succeed("batch", tiny_bundle, source, out, *FIT)
    complete = out.read_bytes()
    out.write_bytes(complete[:-9])
    finished = starling("batch", tiny_bundle, source, out, *FIT)
    assert "in the middle of a line" in finished.stderr
    assert "3 of 4 results are there already" in finished.stderr
    assert sorted(out.read_bytes().splitlines()) == sorted(complete.splitlines())


def test_a_finished_batch_does_nothing_and_further_lines_are_added(tiny_bundle: Path, tmp_path: Path) -> None:
    source, out = questions(tmp_path / "in.jsonl", 2), tmp_path / "out.jsonl"
    succeed("batch", tiny_bundle, source, out, *FIT)
    before = out.read_bytes()
    succeed("batch", tiny_bundle, source, out, *FIT)
    assert out.read_bytes() == before
    succeed("batch", tiny_bundle, questions(source, 3), out, *FIT)
    assert out.read_bytes().startswith(before)
    assert len(results(out)) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda source: source.write_text(source.read_text().replace("Question 1", "question 1")), "line 2"),
        (lambda source: source.write_text(source.read_text().replace('"q1"', '"other"')), "'q1'"),
    ],
    ids=["a prompt", "an id"],
)
def test_a_changed_input_is_refused(tiny_bundle: Path, tmp_path: Path, change: Any, words: str) -> None:
    source, out = questions(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    succeed("batch", tiny_bundle, source, out, *FIT)
    before = out.read_bytes()
    change(source)
    assert words in refusal("batch", tiny_bundle, source, out, *FIT)
    assert out.read_bytes() == before


def test_changed_settings_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    source, out = questions(tmp_path / "in.jsonl", 2), tmp_path / "out.jsonl"
    succeed("batch", tiny_bundle, source, out, *FIT)
    assert "another request, settings or bundle" in refusal(
        "batch", tiny_bundle, source, out, *FIT, "--temperature", "0.5"
    )


BAD_LINES: dict[str, tuple[Any, str]] = {
    "a grammar that is none": ({"prompt": "x", "guided_regex": "("}, "the regex cannot be decoded under"),
    "a token that the model has not": (
        {"prompt": "x", "logit_bias": {"32002": 1}},
        "logit_bias has the token id 32002",
    ),
    "no JSON": ('{"prompt": \n', "not JSON"),
    "no object": ("[1]\n", "a JSON list"),
    "no prompt": ({"id": "x"}, "neither a prompt"),
    "a bad setting": ({"prompt": "x", "temperature": -1}, "temperature is -1"),
    "a number beyond all": ({"prompt": "x", "temperature": 10**400}, "a number that a float can hold"),
    "a deadline beyond all": ({"prompt": "x", "deadline_s": 10**400}, "a number that a float can hold"),
    "a penalty beyond all": ({"prompt": "x", "repetition_penalty": 1e-46}, "give a number from 1e-06"),
    "too many choices": ({"prompt": "x", "n": 129}, "n is 129: give 1 to 128"),
    "half a character": ({"prompt": "x \ud800"}, "not UTF-8"),
    "an unknown field": ({"prompt": "x", "temprature": 1}, "'temprature'"),
    "an id twice": ({"id": "good", "prompt": "x"}, "the id 'good' is that of line 1"),
    "too long": ({"prompt": "word " * 400}, "KV cache holds 256"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_stops_the_batch_with_its_number(tiny_bundle: Path, tmp_path: Path, name: str) -> None:
    line, words = BAD_LINES[name]
    source = write_lines(tmp_path / "in.jsonl", [{"id": "good", "prompt": "Hi", "max_tokens": 2}, line])
    finished = starling("batch", tiny_bundle, source, tmp_path / "out.jsonl", *FIT)
    assert finished.returncode == 2
    assert "line 2: " in finished.stderr
    assert words in finished.stderr
    assert "Traceback" not in finished.stderr


def test_bad_lines_can_be_skipped(tiny_bundle: Path, tmp_path: Path) -> None:
    lines = [line for line, _ in BAD_LINES.values()]
    source = write_lines(tmp_path / "in.jsonl", [{"id": "good", "prompt": "Hi", "max_tokens": 2}, *lines])
    out = tmp_path / "out.jsonl"
    finished = starling("batch", tiny_bundle, source, out, *FIT, "--skip-bad")
    assert finished.returncode == 0
    assert [record["id"] for record in results(out)] == ["good"]
    assert finished.stderr.count("skipped: ") == len(BAD_LINES)
    assert f"{len(BAD_LINES)} bad line(s) skipped" in finished.stderr


def test_two_batches_do_not_write_one_output(tiny_bundle: Path, tmp_path: Path) -> None:
    source, out = questions(tmp_path / "in.jsonl", 200, tokens=100), tmp_path / "out.jsonl"
    with running("batch", tiny_bundle, source, out, *FIT) as first:
        assert wait_until(lambda: out.exists() and out.read_bytes().count(b"\n") > 0, 60)
        assert "another batch" in refusal("batch", tiny_bundle, source, out, *FIT)
        code, _, errors = end(first, signal.SIGINT)
    assert (code, errors.splitlines()[-1]) == (130, "error: interrupted")


def test_other_files_are_left_alone(tiny_bundle: Path, tmp_path: Path) -> None:
    source = questions(tmp_path / "in.jsonl", 1)
    other = tmp_path / "notes.txt"
    other.write_text("dear diary\n")
    assert "line 1, is no result of a batch" in refusal("batch", tiny_bundle, source, other, *FIT)
    assert other.read_text() == "dear diary\n"
    assert "both" in refusal("batch", tiny_bundle, source, source, *FIT)
    assert "cannot be read" in refusal("batch", tiny_bundle, tmp_path / "none.jsonl", tmp_path / "out.jsonl", *FIT)


def test_lines_have_grammars_of_their_own(tiny_bundle: Path, tmp_path: Path) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["a", "b"]}}}
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "response_format": form}
    lines = [
        {"id": "own", "prompt": "Hi", "guided_choice": ["yes"]},
        {"custom_id": "openai", "method": "POST", "url": "/v1/chat/completions", "body": body},
    ]
    source, out = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    assert starling("batch", tiny_bundle, source, out, *FIT).returncode == 0
    answers = {record.get("custom_id", record["id"]): record for record in results(out)}
    assert answers["own"]["text"] == "yes"
    message = answers["openai"]["response"]["body"]["choices"][0]["message"]
    assert json.loads(message["content"]) in ("a", "b")

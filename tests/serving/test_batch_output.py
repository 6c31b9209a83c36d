"""`starling batch` changes no file that is not its own, and reads none without end."""

import json
import os
import resource
import subprocess
from pathlib import Path
from typing import Any

import pytest
from command_line import refusal, starling, starling_command, succeed

pytestmark = pytest.mark.slow

FIT = ("--max-seq", "128", "--threads", "2")
LINES = [{"id": "a", "prompt": "Once", "max_tokens": 2}, {"id": "b", "prompt": "Twice", "max_tokens": 2}]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


@pytest.mark.parametrize(
    "content",
    [
        "a note of one line, without its end",
        "a note\nof two lines",
        json.dumps({"id": "a", "text": "x"}, indent=1),
        json.dumps({"id": "a", "text": "whole, but not ours"}),
        json.dumps({"id": "a", "text": "x", "fingerprint": 5}) + "\n",
        json.dumps([1, 2, 3]),
        '{"id": "not in the input", "text": "torn',
        '{"id": "a',
        "{",
        "[" * 100_000 + "\n",
        "\x00" * 1000,
        "\n",
        "\n\n{",
    ],
    ids=lambda content: content[:30],
)
def test_a_file_that_is_not_this_batchs_is_left_as_it_is(
    tiny_bundle: Path, tmp_path: Path, source: Path, content: str
) -> None:
    out = tmp_path / "out"
    out.write_text(content)
    said = refusal("batch", tiny_bundle, source, out, *FIT)
    assert "give another OUTPUT" in said
    assert out.read_text() == content


def test_a_line_after_another_batchs_results_is_left_as_it_is(tiny_bundle: Path, tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    succeed("batch", tiny_bundle, source, out, *FIT)
    whole = out.read_bytes()
    for torn in (b"a note", b'{"id": "c", "text": "', b'{"id": "a", "text": "again'):
        out.write_bytes(whole + torn)
        assert "in the middle of a line that is no result" in refusal("batch", tiny_bundle, source, out, *FIT)
        assert out.read_bytes() == whole + torn
    # Another bundle's, settings' or input's results: nothing is cut before that is known.
    out.write_bytes(whole[:-9])
    assert "of another request" in refusal("batch", tiny_bundle, source, out, *FIT, "--temperature", "1")
    assert out.read_bytes() == whole[:-9]


@pytest.mark.parametrize("openai", [False, True], ids=["own", "openai"])
def test_a_result_torn_anywhere_is_made_again(tiny_bundle: Path, tmp_path: Path, openai: bool) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out"
    bodies = [{"model": "m", "prompt": "é" * 3, "max_tokens": 2}] * 2
    wrapped = [
        {"custom_id": f"😀{number}", "method": "POST", "url": "/v1/completions", "body": body}
        for number, body in enumerate(bodies)
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in (wrapped if openai else LINES)))
    succeed("batch", tiny_bundle, source, out, *FIT)
    whole = out.read_bytes()
    first = whole.index(b"\n") + 1
    for end in (first + 1, first + 9, len(whole) - 1, first - 1):
        out.write_bytes(whole[:end])
        assert "in the middle of a line" in starling("batch", tiny_bundle, source, out, *FIT).stderr
        assert sorted(out.read_bytes().splitlines()) == sorted(whole.splitlines())


@pytest.mark.parametrize("device", ["/dev/full", "/dev/zero", "/dev/null", "fifo", "link"])
def test_what_is_no_file_is_refused_without_reading_it(
    tiny_bundle: Path, tmp_path: Path, source: Path, device: str
) -> None:
    out = Path(device)
    if device in ("fifo", "link"):
        out = tmp_path / device
        os.mkfifo(out) if device == "fifo" else out.symlink_to("/dev/full")
    assert "no regular file" in refusal("batch", tiny_bundle, source, out, *FIT)


def test_a_line_of_any_length_is_refused_in_bounded_memory(tiny_bundle: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out"
    with source.open("wb") as file:
        file.write(json.dumps(LINES[0]).encode() + b"\n")
        file.truncate(file.tell() + 3 * 10**9)  # a line of zeros that takes no room on the disk
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + json.dumps(LINES[1]).encode() + b"\n")
    finished = _within(4 * 2**30, "batch", tiny_bundle, source, out, *FIT, "--skip-bad")
    assert finished.returncode == 0, finished.stderr
    assert "line 2: it is longer than" in finished.stderr
    assert sorted(json.loads(line)["id"] for line in out.read_text().splitlines()) == ["a", "b"]


def test_bad_values_of_every_kind_are_skipped_one_by_one(tiny_bundle: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out"
    deep = "[" * 20_000 + "]" * 20_000
    values = [
        *("1" + "0" * 400, "1" + "0" * 5000, "-1e999", "NaN", "Infinity", "1e-308", "true", '"1"', '"\\ud800"', deep),
        *("{}", '{"a": ' + deep + "}", "[[1]]", "null"),
    ]
    names = [
        *("temperature", "top_p", "min_p", "repetition_penalty", "deadline_s", "seed", "top_k", "max_tokens", "stop"),
        *("stop_token_ids", "logprobs", "ignore_eos", "n", "logit_bias", "template", "messages", "id", "\\ud800"),
    ]
    lines = [f'{{"prompt": "a", "max_tokens": 1, "{name}": {value}}}\n' for name in names for value in values]
    source.write_text("".join([*lines, json.dumps(LINES[0])]))
    finished = starling("batch", tiny_bundle, source, out, *FIT, "--skip-bad")
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "Traceback" not in finished.stderr
    skipped = [line for line in finished.stderr.splitlines() if line.startswith("skipped: ")]
    answered = out.read_text().splitlines()
    # Each line has its answer, or its refusal, which names it.
    assert len(skipped) + len(answered) == len(lines) + 1
    assert len(answered) > len(names)
    assert all(f"{source}, line " in line for line in skipped)
    assert "a" in {json.loads(line)["id"] for line in answered}


def _within(memory: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command with so many bytes of address space."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))

    command: Any = starling_command(*arguments)
    return subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, timeout=300, check=False)

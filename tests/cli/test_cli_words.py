"""One name for each setting, the nearest name for a slip, and a word about what would change nothing."""

import json
from pathlib import Path

import pytest
from command_line import refusal, starling, succeed
from http_server import serving

from starling.cli.command_group import COMMANDS

QUESTIONS = '{"prompt": "Hello"}\n{"prompt": "Goodbye"}\n'


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    (tmp_path / "questions.jsonl").write_text(QUESTIONS)
    return tmp_path / "questions.jsonl"


def test_help_shows_one_name_for_rows_and_one_for_the_queue() -> None:
    shown = {command: succeed(command, "--help") for command in COMMANDS}
    for old in ("--slots", "--queue ", "--queue-limit", "--name "):
        assert not [command for command, text in shown.items() if old in text]
    having = {
        name: [command for command in COMMANDS if f"  --{name} " in shown[command]]
        for name in ("max-batch", "max-queue")
    }
    assert having == {
        "max-batch": ["build", "score", "serve", "batch", "triton", "verify", "evaluate"],
        "max-queue": ["serve", "triton"],
    }
    assert "Batch sizes to measure" in shown["profile"]
    assert "generate` is greedy" in " ".join(shown["serve"].split())


@pytest.mark.parametrize(
    "names", [("--max-batch", "--max-queue"), ("--slots", "--queue"), ("--slots", "--queue-limit")]
)
def test_old_names_still_work_for_the_server(names: tuple[str, str], tiny_bundle: Path) -> None:
    with serving(tiny_bundle, names[0], "3", names[1], "5", "--max-seq", "64") as server:
        assert any("3 requests at a time, 5 may wait" in line for line in server.log)


def test_old_names_still_work_for_a_repository(tiny_bundle: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("--max-queue", "--queue-limit", "--queue")):
        line = succeed("triton", tiny_bundle, tmp_path / str(number), name, "7", "--max-batch", "3").splitlines()[0]
        assert line.endswith("3 requests at a time, cpu")
        config = (tmp_path / str(number) / "starling" / "config.pbtxt").read_text()
        assert 'key: "queue_limit" value { string_value: "7" }' in config


def test_old_names_still_work_for_an_evaluation(tiny_bundle: Path) -> None:
    common = ("evaluate", tiny_bundle, "--window", "24", "--json")
    new = json.loads(succeed(*common, "--max-batch", "2", "--text-tokens", "48"))
    old = json.loads(succeed(*common, "--batch", "2", "--max-tokens", "48"))
    assert new["windows"] == old["windows"] == 2
    assert new["perplexity"] == old["perplexity"]


@pytest.mark.parametrize(
    ("command", "options", "expected"),
    [
        ("serve", ("--slots", "3", "--max-batch", "4"), "--slots 3 and --max-batch 4 are one setting"),
        ("serve", ("--max-queue", "3", "--queue", "4"), "--queue 4 and --max-queue 3 are one setting"),
        ("triton", ("--queue", "3", "--queue-limit", "4", "repo"), "--queue 3 and --queue-limit 4 are one setting"),
        ("evaluate", ("--batch", "3", "--max-batch", "8"), "--batch 3 and --max-batch 8 are one setting"),
        ("build", ("--name", "a", "--engine", "b"), "give --engine alone"),
        ("serve", ("--slots", "0"), "Invalid value for '--slots': 0 is not in the range"),
        ("serve", ("--max-queue", "-1"), "Invalid value for '--max-queue': -1 is not in the range"),
    ],
)
def test_two_names_with_two_values_are_refused(
    command: str, options: tuple[str, ...], expected: str, tiny_bundle: Path
) -> None:
    assert expected in refusal(command, tiny_bundle, *options)


def test_two_names_with_one_value_are_one(tiny_bundle: Path, questions: Path, tmp_path: Path) -> None:
    same = ("--slots", "1", "--max-batch", "1", "--max-tokens", "2", "--max-seq", "64")
    assert starling("batch", tiny_bundle, questions, tmp_path / "answers.jsonl", *same).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("genrate",), "No such command 'genrate' (did you mean 'generate'?); see: starling --help"),
        (("Doctor",), "No such command 'Doctor' (did you mean 'doctor'?); see: starling --help"),
        (
            ("generate", "b", "hi", "--max-toknes", "8"),
            "No such option '--max-toknes' (did you mean '--max-tokens'?); see: starling generate --help",
        ),
        (
            ("generate", "b", "hi", "--max_tokens=8"),
            "No such option '--max_tokens' (did you mean '--max-tokens'?); see: starling generate --help",
        ),
        (("serve", "b", "--slot", "8"), "No such option '--slot'; see: starling serve --help"),
        (
            ("export", "demo", "o", "--quant", "int9"),
            "Invalid value for '--quant': 'int9' is not one of 'int8', 'int4', 'w8a8', 'fp8', 'none' (did you mean "
            "'int8' or 'int4'?); see: starling export --help",
        ),
        (("generate", "b", "hi", "--backend", "tensort"), "(did you mean 'tensorrt'?)"),
        (("--debgu", "doctor"), "No such option '--debgu' (did you mean '--debug'?); see: starling --help"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_slip_is_answered_with_the_nearest_name(arguments: tuple[str, ...], expected: str) -> None:
    line = refusal(*arguments)
    assert line == expected or (expected.startswith("(") and expected in line)


def test_settings_of_a_draw_are_said_to_change_nothing_where_nothing_is_drawn(tiny_bundle: Path) -> None:
    asked = ("generate", tiny_bundle, "Hello", "--max-tokens", "2")
    finished = starling(*asked, "--seed", "7", "--top-k", "5")
    assert finished.stderr.splitlines()[0] == (
        "--top-k, --seed change nothing at temperature 0 (greedy): add for example --temperature 0.8"
    )
    assert finished.stdout == succeed(*asked)
    for quiet in (("--seed", "7", "--temperature", "0.5"), ("--repetition-penalty", "1.1")):
        assert "nothing" not in starling(*asked, *quiet).stderr
    chat = starling("chat", tiny_bundle, "--min-p", "0.1", "--max-tokens", "2", stdin="Hello\n")
    assert chat.stderr.startswith("--min-p changes nothing at temperature 0")


CUDA, RTX = ("--backend", "onnxruntime-cuda"), ("--backend", "tensorrt-rtx")
CPU = ("--backend", "onnxruntime-cpu")


@pytest.mark.parametrize("command", ["generate", "chat", "serve", "batch", "profile", "evaluate", "triton"])
def test_a_backend_and_settings_that_it_has_no_use_for(
    command: str, tiny_bundle: Path, questions: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    more = {"generate": ["Hello"], "batch": [questions, output], "triton": [output]}.get(command, [])
    line = refusal(command, tiny_bundle, *more, *CUDA, "--threads", "2")
    assert line == "--threads is for a CPU, but --backend onnxruntime-cuda runs on a GPU: leave --threads out"
    line = refusal(command, tiny_bundle, *more, *CPU, "--engine", "fast")
    assert line.startswith("--engine names a TensorRT engine, which --backend onnxruntime-cpu does not run")
    assert not output.exists()


def test_an_engine_of_a_bundle_that_can_have_none(tiny_bundle: Path) -> None:
    line = refusal("generate", tiny_bundle, "Hello", "--engine", "fast")
    assert line == (
        "engine 'fast' is named, which auto does not run for a bundle of dialect ort: leave it out, or export with "
        "--dialect tensorrt"
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("batch", "BUNDLE", "q", "a", "--ray-workers", "4"), "--ray-workers is about a Ray cluster: add --ray"),
        (("batch", "BUNDLE", "q", "a", "--ray-gpus", "1"), "--ray-gpus is about a Ray cluster: add --ray"),
        (("triton", "BUNDLE", "r", *RTX), "--backend tensorrt-rtx runs on a GPU: add --instance-kind gpu"),
        (("triton", "BUNDLE", "r", *CPU, "--instance-kind", "gpu"), "leave --instance-kind gpu out"),
        (("inspect", "BUNDLE", "--engine", "e", "--max-seq", "64"), "--max-seq is about the bundle"),
        (("evaluate", "BUNDLE", "--logits-dtype", "float16"), "add --save-logits"),
        (("profile", "--compare", "a", "b", "--operators"), "--compare measures nothing: leave --operators out"),
        (("profile", "--compare", "a", "b", "--no-cold-start"), "leave --no-cold-start out"),
        (("profile", "--compare", "a", "b", "--output", "c.json"), "leave --output out"),
        (("export", "demo", "o", "--asymmetric"), "--asymmetric is about quantized weights"),
        (("export", "demo", "o", "--revision", "main"), "--revision main is for a hub id, which 'demo' is not"),
        (
            ("export", "demo", "o", *("--dialect", "tensorrt", "--quant", "w8a8", "--no-check", "--accept-quality")),
            "--accept-quality is about the comparison with PyTorch, which --no-check leaves out",
        ),
    ],
    ids=lambda value: value[-2] if isinstance(value, tuple) else "",
)
def test_what_would_be_ignored_is_refused(arguments: tuple[str, ...], expected: str, tiny_bundle: Path) -> None:
    assert expected in refusal(*(tiny_bundle if word == "BUNDLE" else word for word in arguments))


def test_a_batch_says_that_it_has_no_queue(tiny_bundle: Path, questions: Path, tmp_path: Path) -> None:
    short = ("--max-tokens", "2", "--max-seq", "64", "--queue", "3")
    finished = starling("batch", tiny_bundle, questions, tmp_path / "answers.jsonl", *short)
    assert finished.returncode == 0
    assert finished.stderr.splitlines()[0].startswith("--max-queue changes nothing here")


def test_a_prompt_limit_beyond_the_cache_is_refused(tiny_bundle: Path) -> None:
    line = refusal("serve", tiny_bundle, "--port", "0", "--max-seq", "64", "--max-prompt", "65")
    assert line == "--max-prompt is 65, but the KV cache has 64 positions: raise --max-seq"


def test_a_server_ends_in_order_with_0(tiny_bundle: Path) -> None:
    with serving(tiny_bundle, "--max-seq", "64") as server:
        assert server.end() == 0

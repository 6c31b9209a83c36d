"""The commands do what their help says, with the result on stdout and everything else on stderr."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import document, end, install_hint, read_until, running, starling, succeed

from starling.cli.command_group import COMMANDS
from starling.engine.names import DIALECTS, DTYPES, SCHEMES_OF
from starling.export import dialects
from starling.export.tracing import tracer

pytestmark = pytest.mark.slow

HEAVY = ("numpy", "onnxruntime", "torch", "transformers", "onnx", "tokenizers", "jinja2", "rich")
# The three token-id lists of Starling's model card.
SINGLE_TURN = [1, 420, 6316, 28781, 3198, 3123, 1247, 28747, 22557, 32000, 420, 6316, 28781, 3198, 3123, 21631, 28747]
MULTI_TURN = [
    *SINGLE_TURN,
    *(15359, 32000, 420, 6316, 28781, 3198, 3123, 1247, 28747, 1602, 460, 368, 3154, 28804, 32000),
    *(420, 6316, 28781, 3198, 3123, 21631, 28747),
]
CODING = [1, 7596, 1247, 28747, 26256, 2936, 7653, 1413, 334, 1680, 32000, 7596, 21631, 28747]
QUESTION = "What is the capital of France?"


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_loads_nothing_heavy_and_teaches_by_example(arguments: list[str]) -> None:
    program = (
        "import sys; from starling.cli.main import main; code = main(sys.argv[1:]); "
        f"sys.exit(code or ', '.join(name for name in {HEAVY} if name in sys.modules) or 0)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False, timeout=60
    )
    assert finished.returncode == 0, f"loaded: {finished.stderr}"
    assert "Examples:\n" in finished.stdout


def test_the_bare_command_shows_the_help_and_version_the_version() -> None:
    assert succeed() == succeed("--help")
    assert succeed("--version") == "starling, version 0.1.0\n"


def test_what_can_be_asked_for_has_something_that_does_it() -> None:
    assert set(DIALECTS) == set(SCHEMES_OF) == set(dialects.DIALECTS)
    assert set(DTYPES) == set(tracer.TORCH_DTYPES)


def test_tokenize_gives_the_model_cards_ids(tiny_bundle: Path) -> None:
    hello, hi = ("--turn", "user=Hello"), ("--turn", "assistant=Hi")
    single = succeed("tokenize", tiny_bundle, *hello, "--json")
    assert single == json.dumps({"ids": SINGLE_TURN}) + "\n"
    multi = document("tokenize", tiny_bundle, *hello, *hi, "--turn", "user=How are you today?")
    assert multi == {"ids": MULTI_TURN}
    coding = document("tokenize", tiny_bundle, "--template", "code", "--turn", "user=Implement quicksort using C++")
    assert coding == {"ids": CODING}


def test_tokenize_takes_plain_text_and_shows_pieces(demo_bundle: Path) -> None:
    ids = [353, 32, 42, 787, 33665, 3124, 365, 6518, 25]
    text = "        0: no debugging output (default)"
    assert document("tokenize", demo_bundle, text) == {"ids": ids}
    assert document("tokenize", demo_bundle, "-", stdin=text + "\n") == {"ids": ids}
    assert succeed("tokenize", demo_bundle, text) == ",".join(map(str, ids)) + "\n"
    pieces = succeed("tokenize", demo_bundle, "Hi there", "--pieces").splitlines()
    assert [line.split()[1] for line in pieces] == ["'Hi'", "'Ġthere'"]


def test_tokenize_opens_the_assistants_turn_after_a_user_only(tiny_bundle: Path) -> None:
    ids = document("tokenize", tiny_bundle, "--turn", "user=Hello", "--turn", "assistant=Hi")["ids"]
    assert ids[-2:] == [15359, 32000]


def test_generate_answers_by_the_chat_template_and_prints_figures(demo_bundle: Path) -> None:
    finished = starling("generate", demo_bundle, QUESTION, "--max-tokens", "32")
    assert finished.returncode == 0
    assert "Paris" in finished.stdout
    figures = finished.stderr.splitlines()
    assert len(figures) == 1
    for part in ("tokens, stop", "TTFT", "tokens/s", "KV cache 94.4 MB (2048 positions)"):
        assert part in figures[0]


def test_generate_raw_continues_the_text(demo_bundle: Path) -> None:
    text = "The capital of France is"
    [result] = document("generate", demo_bundle, "--raw", text, "--max-tokens", "2")["results"]
    assert result["text"].startswith(" Paris")
    assert result["prompt_tokens"] == document("tokenize", demo_bundle, text)["ids"]
    assert result["finish_reason"] == "length"


@pytest.mark.parametrize("how", ["-", "--prompt-file", "--ids"])
def test_a_prompt_comes_from_an_argument_stdin_a_file_or_ids(how: str, tiny_bundle: Path, tmp_path: Path) -> None:
    text = "The capital of France is"
    (tmp_path / "prompt.txt").write_text(text + "\n")
    ids = succeed("tokenize", tiny_bundle, text).strip()
    given = {"-": ["-", "--raw"], "--prompt-file": [how, str(tmp_path / "prompt.txt"), "--raw"], "--ids": [how, ids]}
    common = ("generate", tiny_bundle, "--max-tokens", "4", "--no-stream")
    assert succeed(*common, *given[how], stdin=text + "\n") == succeed(*common, "--raw", text)


def test_streamed_and_whole_text_are_the_same(tiny_bundle: Path) -> None:
    common = ("generate", tiny_bundle, "Name three fruits.", "--max-tokens", "24")
    streamed = succeed(*common)
    assert streamed == succeed(*common, "--no-stream")
    assert streamed == document(*common)["results"][0]["text"].removesuffix("\n") + "\n"


def test_several_prompts_run_as_one_batch_with_the_same_answers(demo_bundle: Path) -> None:
    prompts = ["The capital of France is", "One, two, three,"]
    batch = document("generate", demo_bundle, "--raw", *prompts, "--max-tokens", "6")
    [alone] = document("generate", demo_bundle, "--raw", prompts[0], "--max-tokens", "6")["results"]
    assert batch["results"][0]["tokens"] == alone["tokens"]
    assert batch["results"][0]["tokens"] != batch["results"][1]["tokens"]
    assert batch["kv_cache"]["rows"] == 2
    assert batch["kv_cache"]["bytes"] == 2 * 2048 * 46080


def test_the_answers_of_a_batch_are_numbered(tiny_bundle: Path) -> None:
    text = succeed("generate", tiny_bundle, "Hello", "Goodbye", "--max-tokens", "3")
    assert text.startswith("[1/2]\n")
    assert "\n[2/2]\n" in text


def test_sampling_options_reach_the_engine(tiny_bundle: Path) -> None:
    common = ("generate", tiny_bundle, "Tell me a story.", "--max-tokens", "8")
    drawn = ("--temperature", "1.5", "--top-k", "500", "--top-p", "0.99", "--min-p", "0.001")
    first, again, other = (succeed(*common, *drawn, "--seed", seed) for seed in ("1", "1", "2"))
    assert first == again
    assert first != other
    assert first != succeed(*common)


def test_stop_strings_end_the_text(demo_bundle: Path) -> None:
    [result] = document("generate", demo_bundle, QUESTION, "--max-tokens", "24", "--stop", "France")["results"]
    assert result["finish_reason"] == "stop"
    assert result["text"] == "The capital of "


def test_speculation_gives_the_same_answer_and_says_what_came_of_it(demo_bundle: Path) -> None:
    asked = ("generate", demo_bundle, "--raw", "red, green, blue, red, green, blue, red, green,")
    speculating = (*asked, "--max-tokens", "24", "--speculation", "prompt-lookup")
    finished = starling(*speculating)
    assert finished.returncode == 0
    assert re.search(r"· \d+ of \d+ drafted tokens accepted ·", finished.stderr)
    assert finished.stdout == succeed(*asked, "--max-tokens", "24")
    timings = document(*speculating)["results"][0]["timings"]
    assert 0 < timings["accepted_tokens"] <= timings["drafted_tokens"]


def test_ignore_eos_goes_on_to_max_tokens(demo_bundle: Path) -> None:
    [result] = document("generate", demo_bundle, QUESTION, "--max-tokens", "16", "--ignore-eos")["results"]
    assert result["finish_reason"] == "length"
    assert len(result["tokens"]) == 16


def test_logprobs_are_shown_for_people_and_programs(demo_bundle: Path) -> None:
    common = ("generate", demo_bundle, "--raw", "The capital of France is", "--max-tokens", "2", "--logprobs", "3")
    [result] = document(*common)["results"]
    assert [entry["token"] for entry in result["logprobs"]] == result["tokens"]
    for entry in result["logprobs"]:
        assert len(entry["top"]) == 3
        assert entry["top"][0] == {"token": entry["token"], "logprob": entry["logprob"]}
    assert "'ĠParis'" in succeed(*common).splitlines()[-2]


def test_ctrl_c_keeps_the_text_so_far_and_the_figures(tiny_bundle: Path) -> None:
    endless = ("--max-tokens", "8000", "--max-seq", "8192", "--ignore-eos")
    with running("generate", tiny_bundle, "Hello", *endless) as process:
        assert process.stdout is not None
        begun = process.stdout.read(20)
        code, rest, errors = end(process, signal.SIGINT)
    assert code == 130
    assert len(begun) == 20
    assert rest.endswith("\n")
    [figures] = errors.splitlines()
    assert "tokens, interrupted" in figures
    assert "TTFT" in figures


def test_sigterm_ends_a_generation(tiny_bundle: Path) -> None:
    endless = ("--max-tokens", "8000", "--max-seq", "8192", "--ignore-eos")
    with running("generate", tiny_bundle, "Hello", *endless) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        code, _, errors = end(process, signal.SIGTERM)
    assert code == 143
    assert errors == ""


def test_a_reader_that_goes_away_is_no_error(tiny_bundle: Path) -> None:
    with running("generate", tiny_bundle, "Hello", "--max-tokens", "200", "--ignore-eos") as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr is not None
        errors = process.stderr.read()
        process.wait(60)
    assert errors == b""


def test_piped_chat_remembers_and_prefills_only_what_is_new(demo_bundle: Path) -> None:
    turns = f"{QUESTION}\nAnd of Italy?\n/reset\nHello\n/exit\nnever answered\n"
    finished = starling("chat", demo_bundle, "--verbose", "--max-tokens", "16", stdin=turns)
    assert finished.returncode == 0, finished.stderr
    assert "Paris" in finished.stdout
    assert "Rome" in finished.stdout
    reused = [int(line.split()[0]) for line in finished.stderr.splitlines() if "reused" in line]
    assert len(reused) == 3
    assert reused[0] == 0
    # The second turn finds the first prompt and its answer in the cache.
    assert reused[1] > len(document("tokenize", demo_bundle, "--turn", f"user={QUESTION}")["ids"])


def test_ctrl_c_in_a_chat_stops_the_reply_and_the_chat_goes_on(tiny_bundle: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        options = ["--max-tokens", "8000", "--max-seq", "8192", "--ignore-eos"]
        os.execv(sys.executable, [sys.executable, "-m", "starling.cli.main", "chat", str(tiny_bundle), *options])
    with os.fdopen(terminal, "r+b", buffering=0) as screen:
        read_until(screen, b"> ")
        screen.write(b"Hello\n")
        read_until(screen, b"Hello\r\n")
        screen.read(1)
        screen.write(b"\x03")
        assert b"\n> " in read_until(screen, b"\n> ")
        screen.write(b"/exit\n")
        status = os.waitpid(pid, 0)[1]
    assert os.waitstatus_to_exitcode(status) == 0


def test_inspect_tells_what_a_bundle_is(tiny_bundle: Path) -> None:
    shown = document("inspect", tiny_bundle, "--max-seq", "4096")
    manifest = json.loads((tiny_bundle / "bundle.json").read_text())
    assert shown["architecture"] == manifest["architecture"]
    assert shown["parity"] == manifest["parity"]
    assert shown["kv_cache"]["bytes"] == 4096 * manifest["kv_cache"]["bytes_per_token"]
    text = succeed("inspect", tiny_bundle, "--verify")
    for part in ("MistralForCausalLM", "sliding window 4096", "16,384 bytes a token", "top-1 agreement 100.0%"):
        assert part in text


def test_doctor_says_what_is_here_and_what_to_install() -> None:
    found = document("doctor")
    assert "CPUExecutionProvider" in found["onnxruntime"]["providers"]
    assert found["packages"]["export"]["torch"] is not None
    assert found["machine"]["physical_cores"] >= 1
    findings = {entry["subject"]: entry for entry in found["findings"]}
    assert findings["generate, chat, profile"]["ok"]
    assert findings["export"]["ok"]
    if not found["gpus"]:
        assert install_hint("gpu") in findings["CUDA"]["text"]
    assert found["onnxruntime"]["version"] in succeed("doctor")

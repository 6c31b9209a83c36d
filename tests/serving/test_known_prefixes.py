"""Known prefixes over HTTP: what a client and a dashboard are told, and who shares what with whom."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from command_line import refusal, starling
from http_server import MODEL, Server, serving

from starling.cli.serve import command as serve_command
from starling.cli.shared.options import _bytes
from starling.engine.batching.prefix_store import DEFAULT_PREFIX_CACHE

SYSTEM = "The harbour office answers questions about ships, tides and prices. " * 12


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[Server]:
    with serving(tiny_bundle, "--max-seq", "512", "--max-batch", "4") as running:
        yield running


def ask(server: Server, question: str, key: str = "none", **settings: Any) -> dict[str, Any]:
    """The usage of a chat's answer."""
    body = {"model": MODEL, "max_tokens": 4, "messages": [{"role": "user", "content": SYSTEM + question}], **settings}
    status, _, content = server.request("POST", "/v1/chat/completions", body, {"Authorization": f"Bearer {key}"})
    assert status == 200, content
    usage: dict[str, Any] = json.loads(content)["usage"]
    return usage


def cached(usage: dict[str, Any]) -> int:
    tokens: int = usage["prompt_tokens_details"]["cached_tokens"]
    return tokens


def test_usage_and_metrics_agree_on_what_was_cached(server: Server) -> None:
    before = {name: server.metric(f"vllm:{name}_total") for name in ("prefix_cache_hits", "prefix_cache_queries")}
    usages = [ask(server, f"Question {number}?", cache_salt="agree") for number in range(20)]
    usages.append(ask(server, "Question 3?", cache_salt="agree", n=4))
    assert cached(usages[0]) == 0
    assert all(cached(usage) >= 128 and cached(usage) % 32 == 0 for usage in usages[1:20])
    assert cached(usages[20]) >= usages[20]["prompt_tokens"] - 33
    after = {name: server.metric(f"vllm:{name}_total") - value for name, value in before.items()}
    assert after["prefix_cache_hits"] == sum(map(cached, usages))
    assert after["prefix_cache_queries"] == sum(usage["prompt_tokens"] for usage in usages)


def test_a_stream_says_it_too(server: Server) -> None:
    chunks = list(
        server.client().chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": SYSTEM + "Streamed?"}],
            max_tokens=2,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens_details is not None
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens is not None


def test_several_choices_prefill_their_prompt_once(server: Server) -> None:
    before = server.metric("vllm:prompt_tokens_total")
    usage = ask(server, "Several?", n=4, seed=3, temperature=1.0, cache_salt="several")
    assert server.metric("vllm:prompt_tokens_total") - before == usage["prompt_tokens"]
    assert usage["completion_tokens"] == 16


def test_a_salt_keeps_prefixes_apart(server: Server) -> None:
    assert [cached(ask(server, "Salt?", cache_salt=salt)) > 0 for salt in ("x", "y", "x")] == [False, False, True]


def test_isolated_keys_share_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("first\nsecond\n")
    keys.chmod(0o600)
    for isolate, second in (((), True), (("--isolate",), False)):
        with serving(tiny_bundle, "--max-seq", "512", "--api-key-file", keys, *isolate) as server:
            found = [cached(ask(server, "Keys?", key)) > 0 for key in ("first", "second", "first")]
            assert found == [False, second, True]
            assert cached(ask(server, "Keys?", "first", cache_salt="own")) == 0
    assert "--isolate keeps API keys apart" in refusal("serve", tiny_bundle, "--isolate")


def test_a_server_without_a_cache_says_so(tiny_bundle: Path) -> None:
    with serving(tiny_bundle, "--max-seq", "512", "--prefix-cache", "0") as server:
        assert [cached(ask(server, "Off?")) for _ in range(2)] == [0, 0]
        assert any("no known prefixes" in line for line in server.log)


def test_the_default_is_the_engines_and_is_printed(server: Server) -> None:
    [option] = [option for option in serve_command.params if option.name == "prefix_cache"]
    assert _bytes(None, option, str(option.default)) == DEFAULT_PREFIX_CACHE  # type: ignore[arg-type]
    assert any("known prefixes up to 2" in line and "tokens)" in line for line in server.log)


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("512MiB", 2**29), ("1.5 GB", 1_500_000_000), ("64k", 64_000), ("7", 7), ("2gib", 2**31)],
)
def test_sizes_have_units(text: str, size: int) -> None:
    [option] = [option for option in serve_command.params if option.name == "prefix_cache"]
    assert _bytes(None, option, text) == size  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["-1", "much", "5XB", "", "1e9", "9" * 20])
def test_what_is_no_size_is_refused(tiny_bundle: Path, text: str) -> None:
    result = CliRunner().invoke(serve_command, [str(tiny_bundle), "--prefix-cache", text])
    assert result.exit_code == 2
    assert "is no size: give for example 512MiB" in result.output


def test_a_batch_takes_a_size_too(tiny_bundle: Path, tmp_path: Path) -> None:
    lines = tmp_path / "in.jsonl"
    lines.write_text(
        "".join(json.dumps({"prompt": SYSTEM + str(number), "max_tokens": 2}) + "\n" for number in range(3))
    )
    starling("batch", tiny_bundle, lines, tmp_path / "out.jsonl", "--max-batch", "1", "--prefix-cache", "16MiB")
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [cached(result["usage"]) > 0 for result in results] == [False, True, True]

"""`starling profile` measures what it says: figures that agree with each other and with the bundle."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import document, refusal, succeed

from starling.engine.bundle import Bundle
from starling.profiling.bandwidth import live_kv_bytes
from starling.profiling.machine import peak_rss_bytes
from starling.profiling.statistics import distribution

RUN = ("--prompt-tokens", "24", "--new-tokens", "9", "--repeats", "3")
LATENCIES = ("time_to_first_token_ms", "inter_token_latency_ms", "time_per_output_token_ms", "request_latency_ms")


@pytest.fixture(scope="module")
def profile(tiny_bundle: Path) -> Any:
    """One profile of the tiny bundle, as JSON."""
    return document("profile", tiny_bundle, *RUN, "--batch", "2", "--threads", "1")


def test_every_run_has_the_lengths_asked_for(profile: Any) -> None:
    assert len(profile["runs"]) == 3
    for run in profile["runs"]:
        assert [(row["prompt_tokens"], row["new_tokens"], row["reused_tokens"]) for row in run] == [(24, 9, 0)] * 2


def test_latencies_are_ordered_and_come_from_the_runs(profile: Any) -> None:
    for name in LATENCIES:
        figures = profile[name]
        ordered = [figures[key] for key in ("min", "p50", "p90", "p95", "p99", "max")]
        assert ordered == sorted(ordered)
        assert 0 < figures["min"] <= figures["avg"] <= figures["max"]
    gaps = [seconds * 1e3 for run in profile["runs"] for seconds in run[0]["itl_s"]]
    assert profile["inter_token_latency_ms"]["count"] == len(gaps) == 3 * 8
    assert profile["inter_token_latency_ms"]["p99"] == pytest.approx(np.percentile(gaps, 99))


def test_decode_speed_is_that_of_the_median_repeat(profile: Any) -> None:
    speed = profile["decode_tokens_per_second"]
    speeds = sorted(8 / sum(run[0]["itl_s"]) for run in profile["runs"])
    assert [speed["slowest_repeat"], speed["per_row"], speed["fastest_repeat"]] == pytest.approx(speeds)
    assert speed["total"] == pytest.approx(2 * speed["per_row"])


def test_host_time_is_what_the_models_run_leaves_of_a_step(profile: Any) -> None:
    assert 0 < profile["host_us_per_step"] < 1e3 * profile["inter_token_latency_ms"]["avg"]


def test_memory_is_that_of_the_cache_and_the_process(profile: Any, tiny_bundle: Path) -> None:
    assert profile["kv_cache"] == {"bytes": 2 * 33 * 16384, "rows": 2, "max_seq": 33}
    weights = Bundle.open(tiny_bundle).weights.bytes
    assert weights < profile["peak_rss_bytes"] < 2e9


def test_bandwidth_is_bytes_of_a_step_times_steps_per_second(profile: Any) -> None:
    reached = profile["bandwidth"]
    assert reached["weight_bytes_per_step"] == 56892416
    # Decode steps 1 to 8 of two rows attend to 25 to 32 positions each.
    assert reached["live_kv_bytes_per_step"] == 2 * 28.5 * 16384
    bytes_per_step = reached["weight_bytes_per_step"] + reached["live_kv_bytes_per_step"]
    assert reached["reached"] == pytest.approx(bytes_per_step * profile["decode_tokens_per_second"]["per_row"])
    assert reached["share"] == pytest.approx(reached["reached"] / reached["machine"])
    assert 1e8 < reached["machine"] < 1e13


def test_a_sliding_window_bounds_the_live_cache(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    assert bundle.architecture.sliding_window == 4096
    assert live_kv_bytes(bundle, 5000, 100) == 4096 * bundle.kv_cache.bytes_per_token
    assert live_kv_bytes(bundle, 4094, 4) == round((4095 + 4096 + 4096) / 3 * bundle.kv_cache.bytes_per_token)


def test_people_get_a_table_and_programs_a_file(tiny_bundle: Path, tmp_path: Path) -> None:
    text = succeed("profile", tiny_bundle, *RUN, "--output", tmp_path / "figures.json")
    for part in ("TTFT", "ITL", "p50", "p90", "p95", "p99", "tokens/s", "host time", "peak RSS", "KV cache", "GB/s of"):
        assert part in text
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["format"] == "starling-profile"
    assert written["settings"]["prompt_tokens"] == 24


def test_percentiles_are_numpys() -> None:
    figures = distribution(float(value) for value in range(1, 102))
    assert (figures.count, figures.min, figures.avg, figures.max) == (101, 1, 51, 101)
    assert (figures.p50, figures.p90, figures.p95, figures.p99) == (51, 91, 96, 100)


def test_peak_memory_is_the_process_own_and_not_its_parents() -> None:
    ballast = np.ones(2**27, np.uint8)
    assert peak_rss_bytes() > ballast.nbytes
    program = "from starling.profiling.machine import peak_rss_bytes; print(peak_rss_bytes())"
    child = int(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout)
    assert child < ballast.nbytes


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--new-tokens", "1"), "--new-tokens is 1: give 2 or more"),
        (("--batch", "0"), "--batch is 0: give 1 or more"),
        (("--repeats", "0"), "--repeats is 0: give 1 or more"),
        (("--warmup", "-1"), "--warmup is -1: give 0 or more"),
        (("--prompt-tokens", "9000"), "need 9128 positions, but this model has 8192"),
        (("--max-seq", "64"), "need 256 positions, but --max-seq is 64"),
        (("--output", "nowhere/figures.json"), "nowhere is no folder: choose another --output"),
    ],
)
def test_impossible_settings(options: tuple[str, ...], expected: str, tiny_bundle: Path) -> None:
    assert expected in refusal("profile", tiny_bundle, *options)

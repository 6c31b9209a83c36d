"""`starling profile` measures what it says: figures that agree with each other and with the bundle."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import document, refusal, succeed

from starling.engine.bundle.manifest import Bundle
from starling.profiling.distribution import distribution
from starling.profiling.machine.describe import peak_rss_bytes

pytestmark = pytest.mark.slow

RUN = ("--prompt-tokens", "24", "--new-tokens", "9", "--repeats", "3")
QUICK = (*RUN, "--no-cold-start")
LATENCIES = ("time_to_first_token_ms", "inter_token_latency_ms", "time_per_output_token_ms", "request_latency_ms")


@pytest.fixture(scope="module")
def profile(tiny_bundle: Path) -> Any:
    """One profile of the tiny bundle, as JSON."""
    return document("profile", tiny_bundle, *RUN, "--batch", "2", "--threads", "1")


@pytest.fixture(scope="module")
def measured(profile: Any) -> Any:
    """Its only measurement."""
    [measured] = profile["measurements"]
    return measured


def test_every_run_has_the_lengths_asked_for(measured: Any) -> None:
    assert len(measured["runs"]) == 3
    for run in measured["runs"]:
        assert [(row["prompt_tokens"], row["new_tokens"], row["reused_tokens"]) for row in run] == [(24, 9, 0)] * 2


def test_warm_up_runs_are_kept_apart(measured: Any) -> None:
    assert len(measured["warmup_runs"]) == 1
    assert measured["inter_token_latency_ms"]["count"] == 3 * 8


def test_latencies_are_ordered_and_come_from_the_runs(measured: Any) -> None:
    for name in LATENCIES:
        figures = measured[name]
        ordered = [figures[key] for key in ("min", "p50", "p90", "p95", "p99", "max")]
        assert ordered == sorted(ordered)
        assert 0 < figures["min"] <= figures["mean"] <= figures["max"]
    gaps = [seconds * 1e3 for run in measured["runs"] for seconds in run[0]["itl_s"]]
    assert measured["inter_token_latency_ms"]["p99"] == pytest.approx(np.percentile(gaps, 99))


def test_latency_by_position_is_the_median_run(measured: Any) -> None:
    third = sorted(run[0]["itl_s"][2] for run in measured["runs"])[1]
    assert len(measured["inter_token_latency_by_position_ms"]) == 8
    assert measured["inter_token_latency_by_position_ms"][2] == pytest.approx(third * 1e3)


def test_decode_speed_is_that_of_the_median_run(measured: Any) -> None:
    speed = measured["output_tokens_per_second"]
    speeds = sorted(8 / sum(run[0]["itl_s"]) for run in measured["runs"])
    assert [speed["slowest_run"], speed["per_row"], speed["fastest_run"]] == pytest.approx(speeds)
    assert speed["total"] == pytest.approx(2 * speed["per_row"])


def test_host_time_is_what_the_models_run_leaves_of_a_step(measured: Any) -> None:
    assert 0 < measured["host_us_per_step"]["p50"] < 1e3 * measured["inter_token_latency_ms"]["mean"]


def test_memory_is_that_of_the_weights_the_cache_and_the_process(profile: Any, tiny_bundle: Path) -> None:
    memory = profile["memory"]
    assert memory["kv_cache_bytes"] == 2 * 33 * 16384
    assert (memory["kv_cache_rows"], memory["kv_cache_positions"]) == (2, 33)
    assert memory["weights_bytes"] == Bundle.open(tiny_bundle).weights.bytes
    assert memory["weights_bytes"] < memory["peak_rss_bytes"] < 2e9


def test_cold_start_is_a_whole_process_and_its_parts_add_up(profile: Any) -> None:
    cold = profile["cold_start"]
    parts = [cold[name] for name in ("process_s", "import_s", "load_s", "first_token_s")]
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(cold["total_s"])


def test_decode_moves_weights_and_live_cache_once_a_step(measured: Any) -> None:
    roof = measured["decode_roof"]
    # Decode steps 1 to 8 of two rows attend to 25 to 32 positions each, and each writes one.
    assert roof["bytes"] == 56892416 + 2 * (28.5 + 1) * 16384
    assert roof["bytes_per_second"] == pytest.approx(roof["bytes"] / roof["model_s"])


def test_a_share_is_the_roofs_time_over_the_time_taken(profile: Any, measured: Any) -> None:
    peaks = profile["machine_peaks"]
    for phase in ("prefill_roof", "decode_roof"):
        roof = measured[phase]
        limits = {
            "arithmetic": roof["operations"] / peaks["operations_per_second"],
            "memory": roof["bytes"] / peaks["read_bytes_per_second"],
        }
        assert roof["bound"] == max(limits, key=lambda name: limits[name])
        assert roof["share"] == pytest.approx(limits[roof["bound"]] / roof["model_s"])


def test_the_environment_is_kept_with_the_figures(profile: Any) -> None:
    environment = profile["environment"]
    assert environment["created"].endswith("+00:00")
    assert {"starling-llm", "numpy", "onnxruntime"} <= environment["packages"].keys()
    assert environment["machine"]["cpu"]
    assert len(environment["load_average"]) == 3
    assert (profile["run"]["provider"], profile["run"]["threads"]) == ("CPUExecutionProvider", 1)


def test_lists_make_a_sweep_over_all_combinations(tiny_bundle: Path) -> None:
    sweep = ("--prompt-tokens", "8,16", "--new-tokens", "3", "--batch", "1,2", "--repeats", "1", "--no-cold-start")
    profile = document("profile", tiny_bundle, *sweep)
    points = [(m["prompt_tokens"], m["new_tokens"], m["batch"]) for m in profile["measurements"]]
    assert points == [(8, 3, 1), (8, 3, 2), (16, 3, 1), (16, 3, 2)]
    assert [len(m["runs"][0]) for m in profile["measurements"]] == [1, 2, 1, 2]
    assert profile["memory"]["kv_cache_positions"] == 19
    assert profile["cold_start"] is None


def test_speculation_is_reported_by_its_acceptance(demo_bundle: Path, tmp_path: Path) -> None:
    lengths = ("--prompt-tokens", "480", "--new-tokens", "24", "--batch", "1,2", "--repeats", "1", "--warmup", "0")
    files = ("--output", tmp_path / "figures.json", "--html", tmp_path / "report.html")
    text = succeed(
        "profile", demo_bundle, *lengths, "--no-cold-start", "--speculation", "prompt-lookup", "--threads", "1", *files
    )
    profile = json.loads((tmp_path / "figures.json").read_text())
    alone, batch = profile["measurements"]
    figures, [[row]] = alone["speculation"], alone["runs"]
    assert profile["run"]["speculation"] == "prompt-lookup"
    assert (figures["drafted_tokens"], figures["accepted_tokens"]) == (row["drafted_tokens"], row["accepted_tokens"])
    assert figures["acceptance"] == figures["accepted_tokens"] / figures["drafted_tokens"]
    assert figures["tokens_per_run"] == 23 / (23 - figures["accepted_tokens"])
    assert alone["decode_roof"] is None  # a run that verifies a draft is no decode step
    if profile["run"]["kernels"]:  # their attention verifies both rows in one run
        assert batch["speculation"]["accepted_tokens"] == sum(row["accepted_tokens"] for row in batch["runs"][0]) > 0
        assert batch["decode_roof"] is None
    else:
        assert batch["speculation"] is None
        assert batch["decode_roof"] is not None
    for place in (text, (tmp_path / "report.html").read_text()):
        assert f"{figures['accepted_tokens']} of {figures['drafted_tokens']} drafted tokens accepted" in place


def test_people_get_tables_and_programs_files(tiny_bundle: Path, tmp_path: Path) -> None:
    files = ("--output", tmp_path / "figures.json", "--html", tmp_path / "report.html")
    text = succeed("profile", tiny_bundle, *QUICK, *files)
    for part in ("TTFT", "ITL", "TPOT", "p50", "p90", "p95", "p99", "tokens/s", "host", "peak RSS", "KV cache", "roof"):
        assert part in text
    written = json.loads((tmp_path / "figures.json").read_text())
    assert (written["format"], written["format_version"]) == ("starling-profile", 2)
    assert "<svg" in (tmp_path / "report.html").read_text()


def test_nvtx_ranges_change_no_figure(tiny_bundle: Path) -> None:
    pytest.importorskip("nvtx")
    profile = document("profile", tiny_bundle, *QUICK, "--nvtx")
    assert len(profile["measurements"][0]["runs"]) == 3


def test_percentiles_are_numpys() -> None:
    figures = distribution(float(value) for value in range(1, 102))
    assert (figures.count, figures.min, figures.mean, figures.max) == (101, 1, 51, 101)
    assert (figures.p50, figures.p90, figures.p95, figures.p99) == (51, 91, 96, 100)


def test_peak_memory_is_the_process_own_and_not_its_parents() -> None:
    ballast = np.ones(2**27, np.uint8)
    assert peak_rss_bytes() > ballast.nbytes
    program = "from starling.profiling.machine.describe import peak_rss_bytes; print(peak_rss_bytes())"
    child = int(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout)
    assert child < ballast.nbytes


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--new-tokens", "1"), "--new-tokens is 1: give 2 or more"),
        (("--batch", "1,0"), "--batch is 0: give 1 or more"),
        (("--repeats", "0"), "--repeats is 0: give 1 or more"),
        (("--warmup", "-1"), "--warmup is -1: give 0 or more"),
        (("--batch", "2,1,2"), "--batch has 2 twice: give every value once"),
        (("--batch", ""), "'' is not a list of whole numbers like 128,1024"),
        (("--batch", "1,"), "'1,' is not a list of whole numbers like 128,1024"),
        (("--batch", "1_0"), "'1_0' is not a list of whole numbers like 128,1024"),
        (("--batch", "-3"), "--batch is -3: give 1 or more"),
        (("--new-tokens", "9" * 30), "is not a list of whole numbers like 128,1024"),
        (("--batch", "1,9000000"), "--batch 9000000 with 176 positions a row needs a KV cache of 25952.26 GB, and"),
        (("--max-seq", "0"), "--max-seq is 0: give 1 or more"),
        (("--compare", "a.json", "b.json", "--html", "x.html", "--repeats", "9"), ", --repeats, --html out"),
        (("--prompt-tokens", "128,many"), "'128,many' is not a list of whole numbers like 128,1024"),
        (("--prompt-tokens", "128,9000"), "need 9048 positions, but this model has 8192"),
        (("--max-seq", "64"), "need 176 positions, but --max-seq is 64"),
        (("--output", "nowhere/figures.json"), "nowhere is no folder: choose another --output"),
        (("--html", "nowhere/report.html"), "nowhere is no folder: choose another --html"),
        (("--compare", "a.json", "b.json"), "--compare measures nothing: leave"),
    ],
)
def test_impossible_settings(options: tuple[str, ...], expected: str, tiny_bundle: Path) -> None:
    assert expected in refusal("profile", tiny_bundle, *options)


def test_spaces_in_a_list_are_no_mistake(tiny_bundle: Path) -> None:
    profile = document("profile", tiny_bundle, *QUICK, "--batch", "1, 2")
    assert [measured["batch"] for measured in profile["measurements"]] == [1, 2]


def test_a_bundle_is_asked_for() -> None:
    assert "no BUNDLE is given" in refusal("profile")

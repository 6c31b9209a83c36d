"""What profile and --compare show at a terminal: whole figures at every width, and words that say what they are."""

import copy
import json
import os
import re
from io import StringIO
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from command_line import document, on_terminal, succeed
from rich.cells import cell_len
from rich.console import Console, RenderableType

from starling.cli.profile import command
from starling.engine.bundle.manifest import Bundle
from starling.engine.progress import Silent
from starling.profiling.latency.sweep import Options, measure
from starling.profiling.latency.sweep_settings import Sweep
from starling.profiling.reports.comparison import compare, comparison_document
from starling.profiling.reports.comparison_report import render_comparison
from starling.profiling.reports.folding import fold
from starling.profiling.reports.html_report import html_report
from starling.profiling.reports.number_formats import (
    STATISTICS,
    latencies,
    load_warning,
    microseconds,
    milliseconds,
    statistics,
)
from starling.profiling.reports.tables import Figures
from starling.profiling.reports.terminal_report import render

pytestmark = pytest.mark.slow

WIDTHS = (60, 80, 120)
IDLE, BUSY = [0.5, 0.5, 0.5], [9.25, 4.0, 2.0]
SWEEP = ("--prompt-tokens", "8,24", "--new-tokens", "5", "--batch", "1,2", "--repeats", "4", "--threads", "1")


@pytest.fixture(scope="module")
def profile(tiny_bundle: Path) -> Any:
    """A sweep with everything in it, on a machine that had nothing else to do."""
    measured = document("profile", tiny_bundle, *SWEEP, "--operators")
    measured["environment"]["load_average"] = IDLE
    return measured


@pytest.fixture(scope="module")
def slow(profile: Any) -> Any:
    """The same with figures as long as those of a machine a thousand times slower, under long names."""
    slower = scaled(profile, 4321.0)
    slower["bundle"]["source"]["name"] = "Organization/A-Model-With-Quite-A-Long-Name-70B-Instruct"
    slower["environment"]["machine"]["cpu"] = "AMD Ryzen Threadripper PRO 7995WX 96-Cores with Radeon Graphics"
    return slower


def scaled(profile: Any, factor: float) -> Any:
    """The profile of a machine whose every latency is `factor` times as long."""
    slower = copy.deepcopy(profile)
    for measured in slower["measurements"]:
        for key in (*latencies(measured), "host_us_per_step"):
            measured[key] |= {name: measured[key][name] * factor for name in STATISTICS}
        for run in measured["runs"]:
            for row in run:
                row["ttft_s"] *= factor
                row["itl_s"] = [seconds * factor for seconds in row["itl_s"]]
                row["host_s"] = [seconds * factor for seconds in row["host_s"]]
    return slower


def alone(profile: Any) -> Any:
    """The profile of its first point only: one row."""
    return {**profile, "measurements": profile["measurements"][:1]}


def with_load(profile: Any, load: list[float]) -> Any:
    """The profile as measured at a load average, on two cores."""
    environment = profile["environment"]
    machine = {**environment["machine"], "physical_cores": 2}
    return {**profile, "environment": {**environment, "machine": machine, "load_average": load}}


def screen(content: RenderableType, width: int) -> str:
    """What a terminal of that width shows, without its colours."""
    file = StringIO()
    Console(file=file, width=width, color_system=None).print(content)
    return file.getvalue()


def compared(a: Any, b: Any, width: int) -> str:
    """The screen of --compare."""
    return screen(render_comparison(compare(a, b), "a.json", "b.json"), width)


def words(text: str) -> set[str]:
    """Everything between spaces."""
    return set(text.split())


def said_in(page: str) -> str:
    """What a page says, without its charts and its markup."""
    return re.sub(r"<style>.*?</style>|<svg.*?</svg>|<[^>]*>", " ", page, flags=re.DOTALL)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["profile", "slow"])
def test_every_figure_of_a_profile_is_whole(kind: str, width: int, request: pytest.FixtureRequest) -> None:
    profile = request.getfixturevalue(kind)
    text = screen(render(profile), width)
    assert "…" not in text
    assert max(map(cell_len, text.splitlines())) <= width
    shown = words(text)
    for measured in profile["measurements"]:
        for key in latencies(measured):
            assert set(statistics(measured[key], milliseconds)) <= shown
        assert set(statistics(measured["host_us_per_step"], microseconds)) <= shown
        assert f"{measured['output_tokens_per_second']['per_row']:.1f}" in shown
    for phase in ("prefill", "decode"):
        times = profile["operators"][phase]
        assert {milliseconds(ms) for ms in (*times["parts_ms"].values(), times["run_ms"])} <= shown


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["profile", "slow"])
def test_every_figure_of_a_comparison_is_whole(kind: str, width: int, request: pytest.FixtureRequest) -> None:
    profile = request.getfixturevalue(kind)
    text = compared(profile, scaled(profile, 1.7), width)
    assert "…" not in text
    assert max(map(cell_len, text.splitlines())) <= width
    for row in compare(profile, scaled(profile, 1.7)).differences:
        if "p99" not in row.metric:  # of four steps a run
            expected = {milliseconds(row.before), milliseconds(row.after), f"{row.ratio:.3f}", f"{row.p:.3f}"}
            assert expected <= words(text)
            assert f"{row.low:.3f} to {row.high:.3f}" in text


@pytest.mark.parametrize("width", WIDTHS)
def test_no_column_becomes_one_of_single_words(profile: Any, width: int) -> None:
    for text in (screen(render(profile), width), compared(profile, scaled(profile, 1.7), width)):
        lonely = [len(line.split()) == 1 and line.startswith("  ") for line in text.splitlines()]
        assert not any(one and next_ for one, next_ in pairwise(lonely))


def test_eighty_columns_hold_a_point_in_one_block_and_its_terms_in_a_line_each(profile: Any) -> None:
    text = screen(render(profile), 80)
    assert len(re.findall(r"^ms +n +min +mean +p50 +p90 +p95 +p99 +max *$", text, re.MULTILINE)) == 4
    terms = text.partition("time to first token")[2].partition("\n\n")[0].splitlines()
    assert len(terms) >= 9
    assert all(line[:1].strip() for line in terms[1:])
    assert len(re.findall(r"^ +A +B +B / A +verdict +95 % interval +p *$", compared(profile, profile, 80), re.M)) == 4


def test_a_table_that_does_not_fit_goes_on_beside_the_same_names() -> None:
    table = Figures(["", "first", "second"], [["a name", "1,234,567", "7,654,321"]])
    assert [line.split() for line in screen(table, 17).splitlines() if "─" not in line] == [
        ["first"],
        ["a", "name", "1,234,567"],
        [],
        ["second"],
        ["a", "name", "7,654,321"],
    ]
    assert len(screen(table, 26).splitlines()) == 3  # one space between the columns, where two do not fit
    assert words(screen(table, 14)) >= {"1,234,567", "7,654,321"}


def test_a_number_stays_beside_its_unit() -> None:
    assert fold("weights 157.7 MB, peak RSS 346.4 MB", 31) == ["weights 157.7 MB, peak RSS", "346.4 MB"]
    assert fold("", 10) == [""]
    assert fold("a" * 12, 10) == ["a" * 12]
    assert fold("a" * 12, 10, cut_words=True) == ["a" * 10, "aa"]


@pytest.mark.parametrize(("count", "given"), [(1, 0), (9, 0), (10, 1), (19, 1), (20, 2), (99, 2), (100, 3)])
def test_a_percentile_takes_a_value_above_it(profile: Any, count: int, given: int) -> None:
    few = copy.deepcopy(alone(profile))
    measured = few["measurements"][0]
    for key in (*latencies(measured), "host_us_per_step"):
        measured[key] |= {"count": count, "p90": 90_001.0, "p95": 95_001.0, "p99": 99_001.0}
    percentiles = [("90,001", "95,001", "99,001")[index] for index in range(given)]
    text = screen(render(few), 80)
    assert re.findall(r"\b9\d,001\b", text) == percentiles * 5
    assert text.count(" - ") >= 5 * (3 - given)
    assert ("too few values" in text) == (given < 3)
    page = html_report(few)
    assert f"<td>{'</td><td>'.join((*percentiles, *['-'] * (3 - given)))}</td>" in page
    assert ("p99 99,001 ms" in page) == (given == 3)
    assert [f"p{share}" in page.partition("Histogram")[2].partition("</svg>")[0] for share in (95, 99)] == [
        given > 1,
        given > 2,
    ]


def test_a_comparison_leaves_out_a_p99_of_few_steps_and_says_so(profile: Any) -> None:
    text = compared(profile, profile, 80)
    assert "ITL p99 ms" not in text
    assert "left out where a run has fewer than 100 decode steps" in text
    assert any(row["metric"] == "ITL p99 ms" for row in comparison_document(compare(profile, profile))["differences"])
    longer = json.loads(json.dumps(alone(profile)))
    longer["measurements"][0]["new_tokens"] = 101
    text = compared(longer, longer, 80)
    assert "ITL p99 ms" in text
    assert "left out" not in text


def test_the_last_rows_latencies_are_the_same_figures_in_report_and_comparison(profile: Any) -> None:
    comparison = compare(profile, profile)
    for measured in profile["measurements"]:
        rows = {
            row.metric: row
            for row in comparison.differences
            if (row.prompt_tokens, row.batch) == (measured["prompt_tokens"], measured["batch"])
        }
        batch = measured["batch"] > 1
        for metric, key in (("TTFT ms", "time_to_first_token"), ("request latency ms", "request_latency")):
            assert rows[metric].before == pytest.approx(measured[f"{key}_last_row_ms"]["p50"])
            assert rows[metric].of == ("last row" if batch else None)
            if not batch:
                assert measured[f"{key}_last_row_ms"] == measured[f"{key}_ms"]
    slowest = [max(row["ttft_s"] for row in run) * 1e3 for run in profile["measurements"][1]["runs"]]
    assert profile["measurements"][1]["time_to_first_token_last_row_ms"]["max"] == pytest.approx(max(slowest))


def test_a_last_row_is_shown_where_there_is_more_than_one(profile: Any) -> None:
    for text in (screen(render(profile), 80), compared(profile, profile, 80), html_report(profile)):
        assert "TTFT, last row" in text
        assert "latency, last row" in text
    one = alone(profile)
    for text in (screen(render(one), 80), compared(one, one, 80), said_in(html_report(one))):
        assert not re.search(r"\brows?\b", text)


def test_terms_are_told_where_they_are_shown_and_only_there(profile: Any) -> None:
    text = screen(render(profile), 80)
    for term in ("TTFT", "ITL", "TPOT", "host time", "row", "last row", "roof", "executor and profiler"):
        assert re.search(rf"^{term}  +\w", text, re.MULTILINE), term
    bare = {**alone(profile), "operators": None, "machine_peaks": None}
    bare["measurements"] = [{**bare["measurements"][0], "prefill_roof": None, "decode_roof": None}]
    text = screen(render(bare), 80)
    for term in ("row", "last row", "roof", "executor and profiler"):
        assert not re.search(rf"^{term}  +\w", text, re.MULTILINE), term
    assert "of tokens verified together one has all of it" not in text
    drafted = copy.deepcopy(bare)
    figures = {"drafted_tokens": 4, "accepted_tokens": 2, "acceptance": 0.5, "tokens_per_run": 1.5}
    drafted["measurements"][0]["speculation"] = figures
    assert "of tokens verified together one has all of it" in screen(render(drafted), 80)
    assert "the least time that memory or arithmetic allow" in html_report(profile)
    assert "the least time that memory or arithmetic allow" not in html_report(bare)


def test_operators_and_what_they_leave_over_make_up_the_run(profile: Any) -> None:
    text = screen(render(profile), 80)
    for phase in ("prefill", "decode"):
        times = profile["operators"][phase]
        assert 0 <= times["run_ms"] - times["operators_ms"] < times["run_ms"]
    assert re.search(r"^executor and profiler +\d", text, re.MULTILINE)
    assert re.search(r"^the run +[\d.,]+ +100% +[\d.,]+ +100% *$", text, re.MULTILINE)


def test_operators_that_overlap_are_never_a_negative_time(profile: Any) -> None:
    overlapping = copy.deepcopy(profile)
    overlapping["operators"]["decode"]["run_ms"] = overlapping["operators"]["decode"]["operators_ms"] / 2
    text = screen(render(overlapping), 80).partition("\noperators: ")[2]
    assert re.search(r"^executor and profiler +[\d.]+ +\d+% +- +- *$", text, re.MULTILINE)
    assert "the operators ran side by side" in text
    page = html_report(overlapping)
    assert "the operators ran side by side" in page
    assert not re.search(
        r"(?<![\w-])-\d", text + re.sub(r"<style>.*?</style>|<svg.*?</svg>", "", page, flags=re.DOTALL)
    )


def test_a_load_above_the_cores_is_a_warning_everywhere(profile: Any) -> None:
    busy, idle = with_load(profile, BUSY), with_load(profile, IDLE)
    warning = "the load average was 9.25 before the measurement, on 2 cores"
    assert warning in " ".join(screen(render(busy), 60).split())
    assert warning in html_report(busy)
    assert warning not in screen(render(idle), 80) + html_report(idle)
    assert load_warning(with_load(profile, [2.0, 9.0, 9.0])["environment"]) is None
    assert load_warning({**busy["environment"], "load_average": None}) is None
    for a, b, names in ((busy, idle, "A"), (idle, busy, "B"), (busy, busy, "AB"), (idle, idle, "")):
        assert [text[0] for text in comparison_document(compare(a, b))["warnings"]] == list(names)
        text = compared(a, b, 80)
        assert [f"warning: {name}: the load average" in text for name in "AB"] == [name in names for name in "AB"]


def test_the_warning_comes_before_the_first_figure(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (1e4, 1.0, 1.0))
    said: list[str] = []

    class Phases(Silent):
        def phase(self, text: str) -> None:
            said.append(text)

    sweep, options = Sweep((8,), (2,), (1,), repeats=1, warmup=0), Options(cold_start=False)
    measure(Bundle.open(tiny_bundle), sweep, options, Phases(), said.append)
    assert "the load average was 10000.00" in said[1]
    assert said[2].endswith("repeat 1 of 1")


def test_the_warning_is_on_stderr_beside_a_document(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (1e4, 1.0, 1.0))
    options = ("--prompt-tokens", "8", "--new-tokens", "2", "--repeats", "1", "--no-cold-start", "--json")
    result = CliRunner().invoke(command, [str(tiny_bundle), *options])
    assert result.stderr.startswith("warning: the load average was 10000.00 before the measurement")
    assert json.loads(result.stdout)["environment"]["load_average"][0] == 1e4


def test_what_else_differs_is_told_whole_or_not_at_all(profile: Any) -> None:
    other = json.loads(json.dumps(alone(profile)))
    other["bundle"]["weights_sha256"] = {"model.onnx.data": "0" * 64}
    other["run"]["threads"] = 7
    text = compared(alone(profile), other, 80)
    assert "weights_sha256: not the same (--json has both)" in text
    assert "threads: 1 → 7" in text


Box = tuple[float, float, float, float]


def boxes(svg: str, names: str) -> list[Box]:
    """Left, top, right and bottom of the labels that match, at a generous width of their characters."""
    found = re.findall(rf'<text x="([\d.]+)" y="([\d.]+)" text-anchor="start">({names})</text>', svg)
    return [(float(x), float(y) - 10, float(x) + 7.2 * len(text), float(y) + 3) for x, y, text in found]


def overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@pytest.mark.parametrize("spread", [(10.0, 10.0, 10.0), (10.0, 10.1, 50.0), (10.0, 49.9, 50.0), (1.0, 20.0, 44.0)])
def test_the_histograms_labels_lie_apart_above_its_bars(profile: Any, spread: tuple[float, float, float]) -> None:
    page = copy.deepcopy(alone(profile))
    measured = page["measurements"][0]
    measured["inter_token_latency_ms"] |= {"count": 200} | dict(zip(("p50", "p95", "p99"), spread, strict=True))
    measured["runs"] = [[{**run[0], "itl_s": [0.001, spread[0] / 1e3, 0.05, 0.05]}] for run in measured["runs"]]
    [svg] = re.findall(r'<svg[^>]*aria-label="Histogram.*?</svg>', html_report(page), re.DOTALL)
    labels = boxes(svg, r"p\d\d [\d.,]+")
    assert len(labels) == 3
    assert not any(overlap(a, b) for a, b in combinations(labels, 2))
    assert all(left >= 0 and right <= 500 and top >= 0 for left, top, right, _ in labels)
    bars = [float(top) for top in re.findall(r'<rect class="c1" x="[\d.]+" y="([\d.]+)"', svg)]
    assert max(bottom for _, _, _, bottom in labels) <= min(bars)
    for x, y in re.findall(r'<line class="rule" x1="([\d.]+)" x2="[\d.]+" y1="([\d.]+)"', svg):
        crossed = [box for box in labels if box[0] < float(x) < box[2] and float(y) < box[1]]
        assert not crossed


def test_the_sweeps_lines_have_names_that_lie_apart(profile: Any) -> None:
    level = copy.deepcopy(profile)
    for measured in level["measurements"]:
        measured["inter_token_latency_ms"]["p50"] = 0.001 if measured["prompt_tokens"] == 24 else 5.0
    charts = re.findall(r'<svg[^>]*aria-label="(?:ITL|TTFT), ms over.*?</svg>', html_report(level), re.DOTALL)
    assert len(charts) == 2
    for svg in charts:
        first, second = boxes(svg, r"batch \d")
        assert not overlap(first, second)
        assert max(first[2], second[2]) <= 500
        assert min(first[1], second[1]) >= 0


def test_a_comparison_has_the_terminals_width_and_a_pipe_its_own(profile: Any, tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps(profile))
    files = (tmp_path / "a.json", tmp_path / "b.json")
    for width in (60, 80):
        text = on_terminal(width, "profile", "--compare", *files)
        assert width - 12 <= max(map(len, text.splitlines())) <= width
    piped = succeed("profile", "--compare", *files)
    assert 100 <= max(map(len, piped.splitlines())) <= 120

"""What is made of a profile's document: an HTML page that needs nothing else, and a comparison that knows its noise."""

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import document, refusal, succeed

from starling.profiling.reports.comparison import compare, difference_of, mann_whitney
from starling.profiling.reports.html_report import html_report
from starling.profiling.reports.svg import Axis

SWEEP = ("--prompt-tokens", "8,24", "--new-tokens", "5", "--batch", "1,2", "--repeats", "4", "--threads", "1")


@pytest.fixture(scope="module")
def profile(tiny_bundle: Path) -> Any:
    """A sweep with everything in it."""
    return document("profile", tiny_bundle, *SWEEP, "--operators")


class Page(HTMLParser):
    """Elements and attributes of a page, and whether every element was closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def of(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attributes for name, attributes in self.elements if name == tag)


def test_the_page_is_whole_and_asks_the_network_for_nothing(profile: Any) -> None:
    text = html_report(profile)
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.elements}
    assert not re.search(r"https?:|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text


def test_the_page_has_every_chart(profile: Any) -> None:
    labels = [str(svg["aria-label"]) for svg in Page(html_report(profile)).of("svg")]
    assert labels.count("Histogram of inter-token latencies") == 4
    assert labels.count("Inter-token latency over the position in the sequence") == 4
    assert "Roofline" in labels
    assert "TTFT, ms over the prompt's length" in labels


def test_every_mark_lies_inside_its_drawing(profile: Any) -> None:
    for attributes in Page(html_report(profile)).of("circle"):
        assert 0 <= float(str(attributes["cx"])) <= 500
        assert 0 <= float(str(attributes["cy"])) <= 270


def test_the_histogram_counts_every_step_once(profile: Any) -> None:
    alone = {**profile, "measurements": profile["measurements"][:1]}
    counts = re.findall(r"<title>(\d+) steps of", html_report(alone))
    assert sum(map(int, counts)) == 4 * 4


def test_a_stall_is_said_where_the_charts_are_cut(profile: Any) -> None:
    stalled = json.loads(json.dumps({**profile, "measurements": profile["measurements"][:1]}))
    [measured] = stalled["measurements"]
    assert "the last bar" not in html_report(stalled)
    steps = [0.01] * 200
    for run in measured["runs"]:
        run[0]["itl_s"] = steps
    measured["runs"][0][0]["itl_s"] = [*steps[:-1], 0.5]
    measured["inter_token_latency_ms"] |= {"p50": 10.0, "p95": 10.0, "p99": 10.0, "max": 500.0, "count": 800}
    page = html_report(stalled)
    assert "inter-token latency, ms; the last bar: up to 500" in page
    assert re.search(r"<title>1 steps of [\d.]+ to 500.00 ms", page)
    assert "inter-token latency, ms; cut, the longest: 500" in page


def test_a_page_can_be_made_of_a_profile_without_extras(profile: Any) -> None:
    bare = {**profile, "operators": None, "machine_peaks": None, "cold_start": None}
    bare["measurements"] = [
        {**measured, "prefill_roof": None, "decode_roof": None} for measured in profile["measurements"]
    ]
    page = html_report(bare)
    assert Page(page).open == []
    assert "Roofline" not in page


def test_names_from_outside_are_escaped(profile: Any) -> None:
    named = json.loads(json.dumps(profile))
    named["bundle"]["source"]["name"] = "<script>alert(1)</script>"
    assert "<script>" not in html_report(named)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (3.2, 3.9), (0, 41234.5), (128, 1024)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    ticks = Axis(low, high, "").ticks()
    assert 2 <= len(ticks) <= 8
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)


def test_a_profile_does_not_differ_from_itself(profile: Any) -> None:
    comparison = compare(profile, profile)
    assert {difference.ratio for difference in comparison.differences} == {1}
    assert {difference.verdict for difference in comparison.differences} == {"within noise"}
    assert comparison.changed == ()
    assert len(comparison.differences) == 4 * 6


def test_a_slower_run_is_told_from_noise(profile: Any) -> None:
    slower = json.loads(json.dumps(profile))
    for measured in slower["measurements"]:
        for run in measured["runs"]:
            for row in run:
                row["itl_s"] = [10 * seconds for seconds in row["itl_s"]]
    slower["run"]["threads"] = 7
    comparison = compare(profile, slower)
    verdicts = {d.metric: d.verdict for d in comparison.differences if (d.prompt_tokens, d.batch) == (24, 1)}
    assert (verdicts["TPOT ms"], verdicts["TTFT ms"]) == ("higher", "within noise")
    assert comparison.changed == (("threads", "1", "7"),)


def test_noise_alone_is_called_noise_nearly_always() -> None:
    random = np.random.default_rng(5)
    verdicts = [difference_of(random.normal(10, 1, 5), random.normal(10, 1, 5))[4] for _ in range(200)]
    assert sum(verdict != "within noise" for verdict in verdicts) <= 0.08 * 200


def test_too_few_runs_are_never_evidence() -> None:
    assert difference_of([1.0, 1.1, 1.2], [9.0, 9.1, 9.2])[4] == "too few runs"


@pytest.mark.parametrize(
    ("before", "after", "p"),
    # As many of all orders are as uneven: 2 of 70, 2 of 252, 14 of 20, all.
    [
        ([1, 2, 3, 4], [5, 6, 7, 8], 2 / 70),
        ([1, 2, 3, 4, 5], [6, 7, 8, 9, 10], 2 / 252),
        ([1, 3, 5], [2, 4, 6], 0.7),
        ([1, 2, 3, 4], [1, 2, 3, 4], 1.0),
    ],
)
def test_the_rank_test_is_exact(before: list[float], after: list[float], p: float) -> None:
    assert mann_whitney(before, after) == pytest.approx(p)


def test_people_and_programs_compare_files(profile: Any, tmp_path: Path) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    for file in (a, b):
        file.write_text(json.dumps(profile))
    text = succeed("profile", "--compare", a, b)
    assert "smaller than the noise" in text
    assert "Mann-Whitney" in text
    result = document("profile", "--compare", a, b)
    assert result["format"] == "starling-comparison"
    assert len(result["differences"]) == 24


def test_files_that_cannot_be_compared(profile: Any, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(profile))
    assert "bad.json cannot be read" in refusal("profile", "--compare", good, bad)
    bad.write_text("{")
    assert "is not JSON" in refusal("profile", "--compare", good, bad)
    bad.write_text('{"format": "other"}')
    assert 'does not say "format": "starling-profile"' in refusal("profile", "--compare", good, bad)
    bad.write_text('{"format": "starling-profile", "format_version": 1}')
    assert "has format_version 1, this Starling reads 2" in refusal("profile", "--compare", good, bad)
    bad.write_text('{"format": "starling-profile", "format_version": 2, "bundle": {}}')
    assert "has no environment, run, load_s" in refusal("profile", "--compare", good, bad)
    bad.write_text(json.dumps({**profile, "measurements": profile["measurements"][:1]}))
    assert len(document("profile", "--compare", good, bad)["differences"]) == 6
    bad.write_text(json.dumps({**profile, "measurements": []}))
    assert "share no combination of lengths and batch" in refusal("profile", "--compare", good, bad)

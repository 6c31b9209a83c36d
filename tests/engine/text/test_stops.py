"""Text ends before a stop string, wherever token borders fall, and nothing is held back without need."""

import itertools
import random

import pytest

from starling.engine.errors import SamplingError
from starling.engine.text.stop_strings import StopMatcher


def run(stops: list[str], chunks: list[str]) -> tuple[str, bool]:
    matcher = StopMatcher(stops)
    shown = ""
    for chunk in chunks:
        emitted, stopped = matcher.push(chunk)
        shown += emitted
        if stopped:
            return shown, True
    return shown + matcher.flush(), False


def all_cuts(text: str) -> list[list[str]]:
    """The text cut at every subset of its borders."""
    cuts = []
    for chosen in itertools.product([False, True], repeat=len(text) - 1):
        borders = [0, *(i + 1 for i, cut in enumerate(chosen) if cut), len(text)]
        cuts.append([text[a:b] for a, b in itertools.pairwise(borders)])
    return cuts


def reference(stops: list[str], text: str) -> tuple[str, bool]:
    """One character at a time: the first stop string that the text ends with."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@pytest.mark.parametrize(
    ("stops", "text"),
    [
        (["\nUser:"], "Hi\nUser: b"),
        (["aab"], "aaaaab!"),
        (["abab"], "xabaabab"),
        (["abcd", "bc"], "xabcdy"),
        (["bcd", "abcd"], "xabcdy"),
        (["END", "EN"], "the END"),
        (["é😀"], "caféé😀z"),
        (["zz"], "no stop z"),
    ],
)
def test_the_cut_does_not_depend_on_where_the_stream_is_divided(stops: list[str], text: str) -> None:
    for chunks in all_cuts(text):
        assert run(stops, chunks) == reference(stops, text)


def test_random_texts_over_a_small_alphabet() -> None:
    rng = random.Random(5)
    for _ in range(2000):
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        chunks = ["".join(rng.choices("abc", k=rng.randint(0, 3))) for _ in range(6)]
        assert run(stops, chunks) == reference(stops, "".join(chunks))


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(["</s>", "\n\n"])
    assert matcher.push("text <") == ("text ", False)
    assert matcher.push("/") == ("", False)
    assert matcher.push("b") == ("</b", False)
    assert matcher.push("line\n") == ("line", False)
    assert matcher.push("next") == ("\nnext", False)


def test_what_is_held_comes_out_at_the_end() -> None:
    matcher = StopMatcher(["STOP"])
    assert matcher.push("ST") == ("", False)
    assert matcher.flush() == "ST"
    assert matcher.flush() == ""


def test_after_a_stop_string_nothing_more_is_shown() -> None:
    matcher = StopMatcher(["."])
    assert matcher.push("One. Two.") == ("One", True)
    assert matcher.push("Three") == ("", True)
    assert matcher.flush() == ""


def test_without_stop_strings_everything_passes() -> None:
    matcher = StopMatcher([])
    assert matcher.push("anything") == ("anything", False)
    assert matcher.flush() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(SamplingError, match="empty"):
        StopMatcher(["x", ""])

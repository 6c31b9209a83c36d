"""Drafts by prompt lookup: what they are made of, how long they are, and what looking them up costs."""

from time import perf_counter

import numpy as np
import pytest

from starling.engine.generation.prompt_lookup import MOST, SIZES, PromptLookup


def test_what_followed_the_newest_tokens_before_is_drafted() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 6, 7, 8, 9, 2, 3])
    assert lookup.draft(4) == [4, 5, 6, 7]
    lookup.push(4)
    assert lookup.draft(4) == [5, 6, 7, 8]
    lookup.push(99)
    assert lookup.draft(MOST) == []


def test_a_single_token_seen_before_is_no_reason_for_a_draft() -> None:
    assert PromptLookup([1, 2, 3, 9, 2]).draft(MOST) == []


def test_the_longest_match_counts_and_of_equals_the_latest() -> None:
    assert PromptLookup([1, 2, 3, 50, 50, 50, 50, 9, 2, 3, 60, 60, 60, 60, 1, 2, 3]).draft(4) == [50] * 4
    assert PromptLookup([2, 3, 50, 50, 50, 50, 2, 3, 60, 60, 60, 60, 2, 3]).draft(4) == [60] * 4


def test_a_text_that_repeats_itself_is_drafted_beyond_its_own_end() -> None:
    lookup = PromptLookup([7, 8, 9] * 3)
    assert lookup.draft(8) == [7, 8, 9, 7, 8, 9, 7, 8]


@pytest.mark.parametrize("most", [0, 1, 3, 100])
def test_a_draft_has_at_most_as_many_tokens_as_there_is_room_for(most: int) -> None:
    assert len(PromptLookup([1, 2, 3, 4, 5, 6, 1, 2]).draft(most)) == min(most, MOST)


def test_answers_are_looked_up_too() -> None:
    lookup = PromptLookup([1])
    for token in (5, 6, 7, 8, 9, 5, 6):
        lookup.push(token)
    assert lookup.draft(3) == [7, 8, 9]


def test_trust_grows_while_a_text_repeats_itself_and_ends_when_it_does_not() -> None:
    rng = np.random.default_rng(1)
    text = rng.integers(0, 1000, 60).tolist()
    lookup = PromptLookup([*text, *text[:2]])
    before = lookup.chances(4)
    assert before == sorted(before, reverse=True)
    for token in text[2:40]:
        lookup.push(token)
    after = lookup.chances(4)
    assert after[-1] > 0.9 > before[-1]
    for _ in range(12):  # matches that foretell nothing
        for token in (*text[50:52], 5000 + int(rng.integers(1000))):
            lookup.push(token)
    for token in text[44:46]:
        lookup.push(token)
    assert lookup.draft(2) == text[46:48]
    assert lookup.chances(1)[0] < before[0] / 2


def test_what_a_match_foretold_counts_whether_it_was_drafted_or_not() -> None:
    drafting, silent = PromptLookup([1, 2, 3] * 3), PromptLookup([1, 2, 3] * 3)
    for token in (1, 2, 3, 1, 7, 2, 3):
        drafting.draft(4)
        drafting.push(token)
        silent.push(token)
    assert drafting.chances(4) == silent.chances(4)


def test_the_index_finds_what_a_search_of_the_whole_text_finds() -> None:
    tokens = np.random.default_rng(0).integers(0, 4, 300).tolist()
    lookup = PromptLookup(tokens[:50])
    for end in range(50, len(tokens)):
        text = tokens[:end]
        matches = ((size, at) for size in SIZES for at in range(end - 1, size - 1, -1))
        found = next((at for size, at in matches if text[at - size : at] == text[-size:]), 0)
        draft = lookup.draft(4)
        assert draft == ((text[found:] * 4)[:4] if found else [])
        lookup.push(tokens[end])


def test_looking_up_costs_microseconds() -> None:
    tokens = np.random.default_rng(0).integers(0, 1000, 5000).tolist()
    begin = perf_counter()
    lookup = PromptLookup(tokens[:1000])
    for token in tokens[1000:]:
        lookup.push(token)
        lookup.draft(MOST)
    # 3 µs on a quiet machine; the bound is for a busy one.
    assert (perf_counter() - begin) / len(tokens) < 50e-6

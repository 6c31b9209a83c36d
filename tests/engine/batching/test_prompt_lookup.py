"""Drafts by prompt lookup: what they are made of, how long they are, and what looking them up costs."""

from time import perf_counter

import numpy as np
import pytest

from starling.engine.generation.prompt_lookup import CERTAIN, FEWEST, FIRST, MOST, SIZES, PromptLookup


def test_what_followed_the_newest_tokens_before_is_drafted() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 6, 7, 8, 9, 2, 3])
    assert lookup.draft(MOST) == [4, 5, 6, 7]
    lookup.push(4)
    assert lookup.draft(MOST) == [5, 6, 7, 8]
    lookup.push(99)
    assert lookup.draft(MOST) == []


def test_a_single_token_seen_before_is_no_reason_for_a_draft() -> None:
    assert PromptLookup([1, 2, 3, 9, 2]).draft(MOST) == []


def test_the_longest_match_counts_and_of_equals_the_latest() -> None:
    assert PromptLookup([1, 2, 3, 50, 50, 50, 50, 9, 2, 3, 60, 60, 60, 60, 1, 2, 3]).draft(4) == [50] * 4
    assert PromptLookup([2, 3, 50, 50, 50, 50, 2, 3, 60, 60, 60, 60, 2, 3]).draft(4) == [60] * 4


def test_a_text_that_repeats_itself_is_drafted_beyond_its_own_end() -> None:
    lookup = PromptLookup([7, 8, 9] * 3)
    lookup.judge(FIRST, FIRST)
    assert lookup.draft(8) == [7, 8, 9, 7, 8, 9, 7, 8]


@pytest.mark.parametrize("most", [0, 1, 3, 100])
def test_a_draft_has_at_most_as_many_tokens_as_there_is_room_for(most: int) -> None:
    assert len(PromptLookup([1, 2, 3, 4, 5, 6, 1, 2]).draft(most)) == min(most, FIRST)


def test_answers_are_looked_up_too() -> None:
    lookup = PromptLookup([1])
    for token in (5, 6, 7, 8, 9, 5, 6):
        lookup.push(token)
    assert lookup.draft(3) == [7, 8, 9]


def test_drafts_grow_while_they_are_taken_whole_and_shrink_when_they_are_not() -> None:
    lookup, lengths = PromptLookup([1, 2] * 20), []
    for accepted in (1.0, 1.0, 1.0, 0.5, 0.0, 0.0, 0.0, 1.0):
        lengths.append(len(lookup.draft(100)))
        lookup.judge(lengths[-1], int(lengths[-1] * accepted))
    assert lengths == [FIRST, 8, MOST, MOST, 9, 4, FEWEST, FEWEST]
    assert len(lookup.draft(100)) == 2 * FEWEST


def test_refused_drafts_ask_for_longer_matches_until_one_is_taken() -> None:
    text = [1, 2, 3, 4, 5, 6]
    lookup = PromptLookup([*text, 90, 2, 3])
    for _ in range(2):
        lookup.judge(4, 0)
    assert lookup.draft(4) == []  # two tokens are known by now to foretell nothing here
    for token in (91, *text[:CERTAIN]):
        lookup.push(token)
    assert lookup.draft(2) == [5, 6]
    lookup.judge(2, 2)
    for token in (92, 2, 3):
        lookup.push(token)
    assert lookup.draft(1) == [4]


def test_the_index_finds_what_a_search_of_the_whole_text_finds() -> None:
    tokens = np.random.default_rng(0).integers(0, 4, 300).tolist()
    lookup = PromptLookup(tokens[:50])
    for end in range(50, len(tokens)):
        text = tokens[:end]
        matches = ((size, at) for size in SIZES for at in range(end - 1, size - 1, -1))
        found = next((at for size, at in matches if text[at - size : at] == text[-size:]), 0)
        draft = lookup.draft(FIRST)
        assert draft == ((text[found:] * FIRST)[:FIRST] if found else [])
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

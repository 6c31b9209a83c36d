"""The pace of prefill beside running requests, with the times of steps and chunks handed in: no clock is read."""

from dataclasses import dataclass, field, replace
from math import inf
from random import Random
from statistics import mean

import numpy as np
import pytest

from starling.engine.batching.prefill_pacing import GRAIN, LEAST, LEAST_BESIDE, PrefillPace
from starling.engine.batching.step_costs import ExtraCost

MOST, SLOWDOWN = 128, 2.5
#: Where tokens of prompts run in the steps themselves.
BESIDE = 1.5


@dataclass
class Machine:
    """What steps and chunks cost, in ms; each varies by `noise` of its time."""

    step: float
    base: float
    per_token: float
    #: How much dearer a token after 1000 others is.
    growth: float = 0.5
    #: A decode step right after a chunk takes so many times a quiet one (cold caches).
    after_chunk: float = 1.1
    noise: float = 0.08
    chance: Random = field(default_factory=lambda: Random(5))

    def step_s(self, *, after_chunk: bool) -> float:
        return self._varied(self.step * (self.after_chunk if after_chunk else 1))

    def chunk_s(self, tokens: int, start: int) -> float:
        return self._varied(self.base + tokens * self.per_token * (1 + self.growth * start / 1000))

    def fitting(self) -> int:
        """Tokens that fit into a step's share, in the middle of a prompt of 1024."""
        left = self.step * (SLOWDOWN - self.after_chunk) - self.base
        return min(int(left / (self.per_token * (1 + self.growth / 2))), MOST)

    def _varied(self, ms: float) -> float:
        return ms / 1e3 * self.chance.lognormvariate(0, self.noise)


def quiet(pace: PrefillPace, machine: Machine, rows: int = 1) -> list[float]:
    """Steps with no prompt between them."""
    steps = [machine.step_s(after_chunk=False) for _ in range(40)]
    for seconds in steps:
        pace.costs.decoded(rows, seconds, after_chunk=False)
    return steps


def beside(pace: PrefillPace, machine: Machine, prompt: int = 1024, rows: int = 1) -> tuple[list[float], list[int]]:
    """A prompt is prefilled between steps: the times from token to token, and the tokens prefilled in each."""
    gaps, prefilled, written = [], [], 0
    while written < prompt:
        budget, spent, tokens, least = pace.budget(rows, 1), 0.0, 0, LEAST
        while written + tokens < prompt and (size := max(pace.chunk(budget - spent, written + tokens), least)):
            seconds = machine.chunk_s(size, written + tokens)
            pace.prefilled(size, written + tokens + size / 2, seconds)
            spent, tokens, least = spent + seconds, tokens + size, 0
        step = machine.step_s(after_chunk=True)
        pace.costs.decoded(rows, step, after_chunk=True)
        gaps.append(spent + step)
        prefilled.append(tokens)
        written += tokens
    return gaps, prefilled


MACHINES = {
    "chunks cost little more than a step": Machine(step=10, base=8, per_token=0.1),
    "a token costs a tenth of a step": Machine(step=10, base=6, per_token=0.9),
    "a step of many rows is dear, a chunk is not": Machine(step=55, base=8, per_token=0.9),
    "chunks have no base": Machine(step=20, base=0, per_token=0.5),
    "a noisy machine": Machine(step=20, base=10, per_token=0.4, noise=0.2),
}


@pytest.mark.parametrize("kind", MACHINES)
def test_running_requests_keep_three_times_their_quiet_latency(kind: str) -> None:
    pace, machine = PrefillPace(MOST, SLOWDOWN), replace(MACHINES[kind], chance=Random(5))
    before = quiet(pace, machine)
    for _ in range(2):  # a fresh pace, and one that has learned
        gaps, _ = beside(pace, machine)
        assert np.percentile(gaps, 95) <= 3 * np.percentile(before, 95)
        assert mean(gaps) <= SLOWDOWN * mean(before) * 1.05


@pytest.mark.parametrize("kind", MACHINES)
def test_the_prompt_gets_most_of_the_time_that_there_is_for_it(kind: str) -> None:
    shares = []
    for seed in range(5):
        pace, machine = PrefillPace(MOST, SLOWDOWN), replace(MACHINES[kind], chance=Random(seed))
        quiet(pace, machine)
        _, prefilled = beside(pace, machine)
        shares.append(mean(prefilled[:-1]) / machine.fitting())
    assert mean(shares) >= 0.5


def test_chunks_of_a_machine_with_constant_times_settle_at_what_fits() -> None:
    pace, machine = PrefillPace(MOST, SLOWDOWN), Machine(20, 8, 0.5, growth=0, after_chunk=1, noise=0)
    quiet(pace, machine)
    assert pace.budget(1, 1) == pytest.approx(0.03)
    _, prefilled = beside(pace, machine, prompt=4000)
    assert prefilled[0] < 2 * GRAIN, "nothing was known of chunks"
    assert set(prefilled[-20:-1]) == {40}, "the multiple of 8 below the 44 tokens that take 30 ms"


def test_a_chunk_in_the_time_left_over_is_not_taken_for_a_share_of_a_long_one() -> None:
    pace, machine = PrefillPace(MOST, SLOWDOWN), Machine(20, 10, 0.4, growth=0, after_chunk=1, noise=0)
    quiet(pace, machine)
    beside(pace, machine)
    assert pace.chunk(0.008) == 0, "8 tokens take 13 ms, whatever a token of a long chunk costs"


def test_where_nothing_decodes_chunks_are_as_long_as_they_may_be() -> None:
    pace = PrefillPace(MOST, SLOWDOWN)
    assert pace.chunk(pace.budget(0, 1)) == MOST
    pace.costs.decoded(1, 0.02, after_chunk=False)
    assert pace.chunk(pace.budget(0, 1)) == MOST
    assert pace.chunk(pace.budget(1, 1)) == 0, "nothing is known of chunks: the caller takes the smallest"


def test_steps_of_more_rows_have_a_quiet_time_of_their_own() -> None:
    pace = PrefillPace(MOST, SLOWDOWN)
    quiet(pace, Machine(10, 5, 0.1, noise=0), rows=1)
    quiet(pace, Machine(50, 5, 0.1, noise=0), rows=8)
    assert pace.budget(8, 1) == pytest.approx(5 * pace.budget(1, 1))
    assert pace.budget(7, 1) == pace.budget(8, 1), "the nearest that is known"


def test_a_bound_may_be_raised_and_left_out() -> None:
    pace, machine = PrefillPace(MOST, BESIDE), Machine(20, 0, 0.5, growth=0, after_chunk=1, noise=0)
    quiet(pace, machine)
    mixed(pace, machine)
    assert pace.beside(1, 1, 0, 500) < pace.beside(1, 2, 0, 500) <= pace.beside(1, 3, 0, 500)
    assert pace.budget(1, 3) == pytest.approx(0.02 * (3 * BESIDE - 1))
    assert pace.budget(1, inf) == inf
    assert pace.beside(1, inf, 0, 500) == pace.chunk(inf) == MOST


def test_one_chunk_that_was_held_up_does_not_stop_the_prompt() -> None:
    pace, machine = PrefillPace(MOST, SLOWDOWN), Machine(20, 8, 0.2, growth=0, after_chunk=1, noise=0)
    quiet(pace, machine)
    beside(pace, machine)
    pace.prefilled(GRAIN, 0.0, 5.0)
    _, prefilled = beside(pace, machine)
    assert mean(prefilled[:6]) > 2 * GRAIN


def mixed(pace: PrefillPace, machine: Machine, prompt: int = 1024, rows: int = 1) -> tuple[list[float], list[int]]:
    """A prompt is prefilled in the steps of others: the times of the steps, and the tokens prefilled in each."""
    gaps, prefilled, written = [], [], 0
    while written < prompt:
        size = min(pace.beside(rows, 1, 0, written), prompt - written)
        # The weights are read for the step in any case: what is left of a chunk's base is a pass over its keys.
        seconds = machine.step_s(after_chunk=False) + machine.chunk_s(size, written) - machine.base / 1e3 * 0.9
        pace.costs.mixed(rows, seconds, prompt=size, position=written + size / 2, drafted=0)
        gaps.append(seconds)
        prefilled.append(size)
        written += size
    return gaps, prefilled


@pytest.mark.parametrize("kind", [kind for kind in MACHINES if kind != "a noisy machine"])
def test_steps_with_a_prompt_in_them_keep_the_bound(kind: str) -> None:
    pace, machine = PrefillPace(MOST, BESIDE), replace(MACHINES[kind], chance=Random(5))
    before = quiet(pace, machine)
    for _ in range(2):
        gaps, _ = mixed(pace, machine)
        assert np.percentile(gaps, 95) <= BESIDE * np.percentile(before, 95)


@pytest.mark.parametrize(("step", "per_token", "fitting"), [(10, 0.1, 48), (50, 0.9, 26), (10, 2.0, 2)])
def test_steps_with_a_prompt_in_them_use_the_time_there_is(step: float, per_token: float, fitting: int) -> None:
    pace = PrefillPace(MOST, BESIDE)
    machine = Machine(step, 0, per_token, growth=0, after_chunk=1, noise=0)
    quiet(pace, machine)
    _, prefilled = mixed(pace, machine, prompt=2000)
    assert 0.75 * fitting <= prefilled[-20] <= fitting


def test_where_nothing_fits_in_a_prompt_still_goes_on() -> None:
    pace, machine = PrefillPace(MOST, BESIDE), Machine(1, 0, 5.0, noise=0)
    quiet(pace, machine)
    _, prefilled = mixed(pace, machine, prompt=100)
    assert set(prefilled[4:]) == {LEAST_BESIDE}


def test_drafted_tokens_leave_less_for_prompts() -> None:
    pace, machine = PrefillPace(MOST, BESIDE), Machine(20, 0, 0.5, growth=0, after_chunk=1, noise=0)
    quiet(pace, machine)
    mixed(pace, machine)
    for drafted in (4, 8, 6, 4, 8, 2) * 5:
        pace.costs.mixed(1, 0.02 + drafted * 0.0005, prompt=0, position=0, drafted=drafted)
    without, beside_eight = pace.beside(1, 1, 0, 500), pace.beside(1, 1, 8, 500)
    assert beside_eight == pytest.approx(without - 8, abs=2)


def test_costs_are_found_whatever_the_lengths_and_positions() -> None:
    cost, dice = ExtraCost(), Random(3)
    for _ in range(200):
        tokens, position = dice.randrange(1, 40), dice.randrange(2000)
        cost.observe(tokens, position, 2e-3 + 1e-3 * position / 1024 + tokens * (3e-4 + 2e-4 * position / 1024))
    for tokens, position in ((8, 100.0), (30, 1500.0)):
        real = 2e-3 + 1e-3 * position / 1024 + tokens * (3e-4 + 2e-4 * position / 1024)
        assert cost.predict(tokens, position) == pytest.approx(real, rel=0.05)


def test_quiet_steps_are_asked_for_where_none_is_known_and_now_and_then() -> None:
    pace = PrefillPace(MOST, BESIDE)
    assert pace.costs.wants_quiet(2)
    pace.costs.decoded(2, 0.01, after_chunk=False)
    assert not pace.costs.wants_quiet(2)
    assert pace.costs.wants_quiet(3)
    for _ in range(100):
        pace.costs.mixed(2, 0.012, prompt=8, position=0, drafted=0)
    assert pace.costs.wants_quiet(2)


def test_a_prompt_takes_at_least_what_the_quickest_chunks_took() -> None:
    pace = PrefillPace(MOST, BESIDE)
    assert pace.least_s(1000) == 0
    pace.prefilled(100, 50.0, 0.05)
    pace.prefilled(100, 150.0, 0.07)
    assert pace.least_s(1000) == pytest.approx(0.5, rel=0.1)

"""Whose turn it is among requests that wait for a row."""

from pathlib import Path

import pytest

from starling.engine import Engine
from starling.engine.batching.request import Request
from starling.engine.batching.waiting_requests import WaitingRequests
from starling.engine.generation.sampling_params import SamplingParams


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Engine:
    return Engine(tiny_bundle, backend="onnxruntime-cpu", max_seq=256, threads=1)


@pytest.fixture
def request_of(engine: Engine):  # type: ignore[no-untyped-def]
    def make(owner: str = "", priority: int = 0, tokens: int = 10) -> Request:
        sequence = engine.prepare(list(range(900, 900 + tokens)), SamplingParams())
        request = Request(sequence, owner=owner, priority=priority)
        request.written = tokens
        return request

    return make


def served(waiting: WaitingRequests, count: int) -> list[Request]:
    """The next requests, each of which ends before the one after it gets its turn."""
    order = []
    for _ in range(count):
        request = waiting.next(())
        waiting.remove(request)
        waiting.ended(request, is_last=not waiting.requests)
        order.append(request)
    return order


def test_without_owners_and_priorities_the_first_is_first(request_of) -> None:  # type: ignore[no-untyped-def]
    waiting, made = WaitingRequests(), [request_of() for _ in range(4)]
    for request in made:
        waiting.add(request, ())
    assert waiting.requests == made
    assert served(waiting, 4) == made


def test_a_lower_priority_goes_first_whoever_it_is_of(request_of) -> None:  # type: ignore[no-untyped-def]
    waiting, made = WaitingRequests(), [request_of("a", 5), request_of("b", 0), request_of("a", -3), request_of("b", 5)]
    for request in made:
        waiting.add(request, ())
    assert served(waiting, 4) == [made[2], made[1], made[0], made[3]]


def test_who_has_had_least_is_next(request_of) -> None:  # type: ignore[no-untyped-def]
    waiting = WaitingRequests()
    many, few = [request_of("many", tokens=100) for _ in range(4)], [request_of("few", tokens=40) for _ in range(4)]
    for request in (*many, *few):
        waiting.add(request, ())
    owners = [request.owner for request in served(waiting, 8)]
    assert owners == ["many", "few", "few", "few", "many", "few", "many", "many"]


def test_what_runs_counts_as_had(request_of) -> None:  # type: ignore[no-untyped-def]
    waiting, running = WaitingRequests(), [request_of("a"), request_of("a"), request_of("b")]
    late, early = request_of("b"), request_of("a")
    for request in (early, late):
        waiting.add(request, running)
    assert waiting.next(running) is late


def test_who_comes_back_after_a_pause_has_no_claim_to_it(request_of) -> None:  # type: ignore[no-untyped-def]
    waiting = WaitingRequests()
    busy = [request_of("busy", tokens=100) for _ in range(6)]
    for request in busy:
        waiting.add(request, ())
    served(waiting, 4)
    for _ in range(3):
        waiting.add(request_of("back", tokens=100), ())
    assert [request.owner for request in served(waiting, 5)] == ["busy", "back", "busy", "back", "back"]

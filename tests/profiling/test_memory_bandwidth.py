"""The memory bandwidth that profiles are held against is a physical figure, in bytes per second."""

import time

import numpy as np
import pytest

from starling.engine.errors import UserError
from starling.profiling.machine.memory_bandwidth import measure_read_bandwidth

MIB = 2**20


def test_the_figure_lies_between_a_slow_memory_card_and_the_fastest_memory_made() -> None:
    assert 0.1e9 < measure_read_bandwidth(threads=1, bytes=64 * MIB, repeats=2) < 5e12


def test_the_unit_is_bytes_per_second_of_a_plain_read_on_the_same_machine() -> None:
    words = np.ones(64 * MIB // 8, np.int64)
    start = time.perf_counter()
    words.max()
    plain = words.nbytes / (time.perf_counter() - start)
    # A factor of 30 cannot be noise: it would be a wrong unit, or a pass that did not read the array.
    assert plain / 30 < measure_read_bandwidth(threads=1, bytes=64 * MIB, repeats=3) < plain * 30


def test_allocation_and_page_faults_are_not_part_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 2.0, 10.0, 11.0, 20.0, 24.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    # Three passes of 2, 1 and 4 seconds: the best one counts, and nothing reads the clock outside a pass.
    assert measure_read_bandwidth(threads=2, bytes=4 * MIB, repeats=3) == 4 * MIB


@pytest.mark.parametrize("threads", [1, 3])
def test_every_byte_counts_when_the_size_does_not_divide_by_the_threads(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter([0.0, 1.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    assert measure_read_bandwidth(threads=threads, bytes=MIB + 20, repeats=1) == MIB + 20


@pytest.mark.parametrize(
    ("threads", "size", "repeats"), [(0, MIB, 1), (1, MIB, 0), (4, 8, 1)], ids=["threads", "repeats", "bytes"]
)
def test_impossible_settings_are_refused_by_name(threads: int, size: int, repeats: int) -> None:
    with pytest.raises(UserError, match=r"is -?\d+"):
        measure_read_bandwidth(threads, size, repeats)

"""Steps that are launched before the host has seen the tokens of the step before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import NoReturn, Self

from starling.engine.backends.backend import RowPart, check_room
from starling.engine.backends.cuda.cuda_device import address_of
from starling.engine.backends.cuda.device_memory import DeviceMemory
from starling.engine.errors import BackendError

#: One step that runs and one after it: a third would only be thrown away when a row ends.
DEPTH = 2
TOKEN_BYTES = 8
#: Row counts whose decode steps an opening prepares; one that is met later is prepared then.
MOST_ROWS_WARM = 16


class LaunchedSteps:
    """The tokens of up to DEPTH launched steps, each step's in page-locked memory of its own."""

    def __init__(self, memory: DeviceMemory, rows: int) -> None:
        self._memory = memory
        self._tokens = memory.host((DEPTH, rows), "int64")
        self._events = [memory.event() for _ in range(DEPTH)]
        self._rows = [0] * DEPTH
        self._oldest = self._count = 0

    @property
    def busy(self) -> bool:
        """Whether something was launched whose tokens nobody has asked for."""
        return self._count > 0

    @property
    def full(self) -> bool:
        """Whether nothing more may be launched before `oldest` is asked for."""
        return self._count == DEPTH

    def launch(self, step: Callable[[], None], rows: int, chosen: int) -> None:
        """Launch `step`, which leaves `rows` tokens at the device address `chosen`."""
        place = (self._oldest + self._count) % DEPTH
        step()
        self._memory.copy(address_of(self._tokens[place]), chosen, rows * TOKEN_BYTES)
        self._memory.device.record(self._events[place], self._memory.stream)
        self._rows[place] = rows
        self._count += 1

    def oldest(self) -> list[int]:
        """Wait for the oldest launched step; its tokens, one for each of its rows."""
        place = self._oldest
        self._memory.device.wait(self._events[place])
        self._oldest = (place + 1) % DEPTH
        self._count -= 1
        tokens: list[int] = self._tokens[place, : self._rows[place]].tolist()
        return tokens

    def drop(self) -> None:
        """Wait until the stream is idle, and forget the tokens that nobody has asked for."""
        self._memory.synchronize()
        self._count = 0


class LaunchingBackend:
    """What backends share whose device chooses tokens and feeds them: they are their own `StepsAhead`."""

    max_seq: int
    max_batch: int
    model_seconds: float
    _launched: LaunchedSteps
    #: `mix` is not to be had.
    most_mixed = 0
    #: Positions of each row that are written when all that was launched has run.
    _lengths: list[int]

    @property
    def steps_ahead(self) -> Self:
        """Itself: tokens are chosen on the device, and a step finds there those of the step before."""
        return self

    def can_launch(self, rows: int) -> bool:
        """Whether one more step of the first `rows` rows may be launched, and stays inside the cache."""
        return not self._launched.full and max(self._lengths[:rows]) < self.max_seq

    def launch(self, rows: int) -> None:
        """Launch a step of the first `rows` rows, each fed with the token chosen last, after what was launched."""
        check_room(self, rows - 1, max(self._lengths[:rows]))
        self._launch(rows)

    def tokens(self) -> list[int]:
        """Wait for the oldest launched step; the token chosen in each of its rows, -1 where it cannot be chosen."""
        begin = perf_counter()
        chosen = self._launched.oldest()
        self.model_seconds += perf_counter() - begin
        return chosen

    def mix(self, parts: Sequence[RowPart], kept: Sequence[int]) -> NoReturn:
        """Refuse: these graphs take equally many tokens of each row."""
        raise BackendError("this backend takes equally many tokens of each row")

    def row_copies(self, blocks: int) -> None:
        """Rows on a device are not copied."""

    def drop(self) -> None:
        """Wait for everything launched, and forget the tokens that nobody asked for."""
        self._launched.drop()

    def _launch(self, rows: int) -> None:
        """Launch a step of the first `rows` rows, and count its positions in `_lengths`."""
        raise NotImplementedError

"""Steps that are launched before the host has seen the tokens of the step before."""

from __future__ import annotations

from collections.abc import Callable

from starling.engine.backends.cuda.cuda_device import address_of
from starling.engine.backends.cuda.device_memory import DeviceMemory

#: One step that runs and one behind it: a third would only be thrown away when a row ends.
DEPTH = 2
TOKEN_BYTES = 8


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
        slot = (self._oldest + self._count) % DEPTH
        step()
        self._memory.copy(address_of(self._tokens[slot]), chosen, rows * TOKEN_BYTES)
        self._memory.device.record(self._events[slot], self._memory.stream)
        self._rows[slot] = rows
        self._count += 1

    def oldest(self) -> list[int]:
        """Wait for the oldest launched step; its tokens, one for each of its rows."""
        slot = self._oldest
        self._memory.device.wait(self._events[slot])
        self._oldest = (slot + 1) % DEPTH
        self._count -= 1
        tokens: list[int] = self._tokens[slot, : self._rows[slot]].tolist()
        return tokens

    def drop(self) -> None:
        """Wait until the stream is idle, and forget the tokens that nobody has asked for."""
        self._memory.synchronize()
        self._count = 0

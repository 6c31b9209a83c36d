"""Which request has which row of the KV cache, and what a decode step of the first rows is given."""

from __future__ import annotations

from bisect import insort
from heapq import heappop, heappush

from starling.engine.request import Request


class SlotTable:
    """Rows 0, 1, … of the cache. A decode step covers all rows up to the last live one: `tokens` and `positions`.

    A row among them that is free gets token 0 at position 0, which the next prompt overwrites. A row that is between
    two chunks of its prefill gets the next prompt token at its own position, which the next chunk writes again.
    """

    def __init__(self, rows: int) -> None:
        self._free = list(range(rows))
        self._requests: list[Request | None] = [None] * rows
        self._tokens, self._positions = [0] * rows, [0] * rows
        #: Rows that decode, ascending.
        self.live: list[int] = []

    @property
    def has_free(self) -> bool:
        """Whether a request can be given a row."""
        return bool(self._free)

    @property
    def requests(self) -> list[Request]:
        """All requests that have a row, by row."""
        return [request for request in self._requests if request is not None]

    @property
    def live_requests(self) -> list[Request]:
        """The requests that decode, by row."""
        return [request for row in self.live if (request := self._requests[row]) is not None]

    def step(self) -> tuple[list[int], list[int]]:
        """Token and position for each row up to the last live one."""
        rows = self.live[-1] + 1
        return self._tokens[:rows], self._positions[:rows]

    def take(self, request: Request) -> None:
        """Give the request the lowest free row: decode steps then cover as few rows as can be."""
        request.slot = heappop(self._free)
        self._requests[request.slot] = request
        self.hold(request)

    def hold(self, request: Request) -> None:
        """The row holds `request.written` prompt tokens, and is to be left alone until the next chunk."""
        row = request.slot
        self._tokens[row], self._positions[row] = request.sequence.prompt[request.written], request.written

    def advance(self, request: Request, token: int) -> None:
        """`token` is the newest of a request that goes on; the sequence's limit keeps it inside the cache."""
        row, sequence = request.slot, request.sequence
        self._tokens[row], self._positions[row] = token, len(sequence.prompt) + len(sequence.tokens) - 1
        if len(sequence.tokens) == 1:
            insort(self.live, row)

    def release(self, request: Request) -> None:
        """The request's row is free again."""
        row, request.slot = request.slot, -1
        self._requests[row] = None
        self._tokens[row] = self._positions[row] = 0
        if row in self.live:
            self.live.remove(row)
        heappush(self._free, row)

"""The one table of rows: which request has which row of the KV cache, and what the next step gives to each row."""

from __future__ import annotations

from bisect import insort
from heapq import heappop, heappush

from starling.engine.batching.request import Request
from starling.engine.text.grammar_state import GrammarState


class RowTable:
    """Rows 0, 1, … of the cache. A step covers all rows up to the last live one: `tokens` and `positions`.

    A free row among them is given token 0 at position 0, which the next prompt overwrites; with `keep`, what it would
    be given if it went on, so that a later turn of a chat finds its cache whole. A row that is between two chunks of
    its prefill is given the next prompt token at its own position, which the next chunk writes again.
    """

    __slots__ = (
        *("_free", "_keep", "_last_position", "_requests", "covered", "grammars", "live", "live_requests"),
        *("needs_logits", "positions", "requests", "tokens"),
    )

    def __init__(self, rows: int, positions: int, *, keep: bool = False) -> None:
        self._last_position = positions - 1
        self._keep = keep
        self._free = list(range(rows))
        self._requests: list[Request | None] = [None] * rows
        #: Each row's newest token, and where the next step writes it. The scheduler puts a token here without a
        #: call: one takes 4 µs with cold caches. The sequence's limit keeps the position inside the cache.
        self.tokens, self.positions = [0] * rows, [0] * rows
        #: How many rows a step covers: all up to the last live one.
        self.covered = 0
        #: Rows that decode, ascending.
        self.live: list[int] = []
        #: All requests that have a row, and those that decode, by row; made anew with every change of them, so that a
        #: list may be held across one.
        self.requests: list[Request] = []
        self.live_requests: list[Request] = []
        #: Whether one that decodes needs logits on the host.
        self.needs_logits = False
        #: Where those that decode under a grammar are in it.
        self.grammars: list[GrammarState] = []

    @property
    def has_free(self) -> bool:
        """Whether a request can be given a row."""
        return bool(self._free)

    def take(self, request: Request) -> None:
        """Give the request the lowest free row: steps then cover as few rows as can be."""
        request.row = heappop(self._free)
        self._requests[request.row] = request
        self._renew()
        self.hold(request)

    def hold(self, request: Request) -> None:
        """The row holds `request.written` prompt tokens, and is to be left alone until the next chunk."""
        row = request.row
        self.tokens[row], self.positions[row] = request.sequence.prompt[request.written], request.written

    def go_live(self, request: Request, token: int) -> None:
        """The prompt is written and `token` chosen: the row decodes from now on."""
        row = request.row
        self.tokens[row], self.positions[row] = token, len(request.sequence.prompt)
        insort(self.live, row)
        self._renew()

    def release(self, request: Request) -> None:
        """The request's row is free again."""
        row, request.row = request.row, -1
        self._requests[row] = None
        if not self._keep:
            self.tokens[row] = self.positions[row] = 0
        elif request.sequence.tokens:
            end = len(request.sequence.prompt) + len(request.sequence.tokens) - 1
            if end <= self._last_position:
                self.tokens[row], self.positions[row] = request.sequence.tokens[-1], end
        if row in self.live:
            self.live.remove(row)
        self._renew()
        heappush(self._free, row)

    def _renew(self) -> None:
        self.requests = [request for request in self._requests if request is not None]
        self.live_requests = [request for row in self.live if (request := self._requests[row]) is not None]
        self.covered = self.live[-1] + 1 if self.live else 0
        self.grammars = [
            request.sequence.grammar for request in self.live_requests if request.sequence.grammar is not None
        ]
        self.needs_logits = any(request.sequence.needs_logits for request in self.live_requests)

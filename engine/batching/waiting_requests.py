"""Requests that wait for a row, and which is next: by priority, then by what their owners had, then by arrival."""

from __future__ import annotations

from collections.abc import Sequence

from starling.engine.batching.request import Request


class WaitingRequests:
    """Fair between owners by the tokens of theirs that ran, prompts and answers alike.

    After Sheng et al., "Fairness in Serving Large Language Models" (2024): the owner who has had least is next, and one
    who comes back after a pause has no claim to the time in between.
    """

    __slots__ = ("_had", "requests")

    def __init__(self) -> None:
        #: In the order of their arrival. The scheduler looks at it at each step, without a call.
        self.requests: list[Request] = []
        #: Tokens of ended requests, by owner.
        self._had: dict[str, int] = {}

    def add(self, request: Request, running: Sequence[Request]) -> None:
        """A request has come."""
        had = self._had_by_owner(running)
        present = {one.owner for one in (*running, *self.requests)}
        if present and request.owner not in present:
            least = min(had.get(owner, 0) for owner in present)
            self._had[request.owner] = max(had.get(request.owner, 0), least)
        self.requests.append(request)

    def remove(self, request: Request) -> None:
        """The request waits no more."""
        self.requests.remove(request)

    def next(self, running: Sequence[Request]) -> Request:
        """Whose turn it is, while these run."""
        had = self._had_by_owner(running)
        # `min` gives the first of equals, which came first.
        return min(self.requests, key=lambda one: (one.priority, had.get(one.owner, 0)))

    def ended(self, request: Request, *, is_last: bool) -> None:
        """A request that ran has ended; with the last one of all everybody is even."""
        if is_last:
            self._had.clear()
        else:
            self._had[request.owner] = self._had.get(request.owner, 0) + _tokens(request)

    def _had_by_owner(self, running: Sequence[Request]) -> dict[str, int]:
        had = dict(self._had)
        for request in running:
            had[request.owner] = had.get(request.owner, 0) + _tokens(request)
        return had


def _tokens(request: Request) -> int:
    return request.written + len(request.sequence.tokens)

"""Stop strings in streamed text, wherever the stream is cut."""

from collections.abc import Sequence

from starling.engine.errors import SamplingError


class StopMatcher:
    """Cuts a text before the first stop string to be complete, and holds back only what may still become one.

    How the text is cut into pushes makes no difference; of two stop strings that end together, the longer counts.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises SamplingError for an empty stop string, which would stop everything."""
        if not all(stops):
            raise SamplingError("a stop string is empty: leave it out", field="stop")
        self._stops = tuple(stops)
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """The text that can be shown now, and whether a stop string was met; after one nothing more is shown."""
        if self._stopped:
            return "", True
        if not self._stops:
            return text, False
        text = self._held + text
        start = self._first_stop(text)
        self._stopped = start is not None
        keep = len(text) - self._may_become_stop(text) if start is None else start
        self._held = "" if self._stopped else text[keep:]
        return text[:keep], self._stopped

    def flush(self) -> str:
        """What was held back, when the text has come to its end without a stop string."""
        held, self._held = self._held, ""
        return held

    def _first_stop(self, text: str) -> int | None:
        """Where the stop string begins that ends first."""
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _may_become_stop(self, text: str) -> int:
        """The length of the longest end of the text with which a stop string begins."""
        return max(_overlap(text, stop) for stop in self._stops)


def _overlap(text: str, stop: str) -> int:
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)

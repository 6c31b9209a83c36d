"""What a long task reports while it runs; the command line shows it (`cli/shared/progress_bar.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

#: Takes how much is done, and how much there is in all.
Advance: TypeAlias = Callable[[int, int], None]


class Progress(Protocol):
    """Receives what a task is doing, phase by phase."""

    def phase(self, text: str) -> None:
        """A new phase begins, in place of the one before."""

    def steps(self, done: int, total: int) -> None:
        """How many steps of the phase are done."""

    def bytes(self, done: int, total: int) -> None:
        """How many bytes of the phase are done."""

    def note(self, text: str) -> None:
        """Something that the person at the terminal should know."""


class Silent:
    """Shows nothing."""

    def phase(self, text: str) -> None:
        """Ignore it."""

    def steps(self, done: int, total: int) -> None:
        """Ignore it."""

    def bytes(self, done: int, total: int) -> None:
        """Ignore it."""

    def note(self, text: str) -> None:
        """Ignore it."""

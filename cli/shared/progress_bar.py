"""Progress on stderr: a bar on a terminal, plain lines or nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from starling.cli.shared.output import human_bytes, human_seconds, note
from starling.engine.progress import Progress, Silent

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress


@contextmanager
def progress_on_stderr(*, lines: bool = False, refresh: bool = True) -> Iterator[Progress]:
    """A bar on the terminal's last line while the block runs; off a terminal nothing, or with `lines` a line a phase.

    Without `refresh` the bar is drawn only when something is reported: a thread that draws it would take time from what
    is measured.
    """
    if not sys.stderr.isatty():
        yield _Lines() if lines else Silent()
        return
    with _bar(refresh=refresh) as bar:
        yield _Bar(bar, refresh=refresh)


def _bar(*, refresh: bool) -> RichProgress:
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        *([progress.SpinnerColumn()] if refresh else []),
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TextColumn("{task.fields[amount]}"),
        progress.TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        auto_refresh=refresh,
    )


class _Bar:
    """One bar: the phase, how much of it is done, the seconds since it began and those left."""

    def __init__(self, bar: RichProgress, *, refresh: bool) -> None:
        self._bar, self._refresh = bar, refresh
        self._task = bar.add_task("", total=None, amount="")

    def phase(self, text: str) -> None:
        """Show the phase in place of the one before."""
        self._bar.reset(self._task, total=None, description=text, amount="")
        self._draw()

    def steps(self, done: int, total: int) -> None:
        """Move the bar."""
        self._move(done, total, f"{done}/{total}")

    def bytes(self, done: int, total: int) -> None:
        """Move the bar."""
        self._move(done, total, f"{human_bytes(done)} of {human_bytes(total)}")

    def note(self, text: str) -> None:
        """A line above the bar."""
        self._bar.console.print(text, style="dim", highlight=False, markup=False)

    def _move(self, done: int, total: int, amount: str) -> None:
        self._bar.update(self._task, completed=done, total=total)
        left = self._bar.tasks[0].time_remaining
        self._bar.update(self._task, amount=amount if left is None else f"{amount}, {human_seconds(left)} left")
        self._draw()

    def _draw(self) -> None:
        if not self._refresh:
            self._bar.refresh()


class _Lines(Silent):
    """A line for each phase and note: a log wants no line for each step."""

    def phase(self, text: str) -> None:
        """Print it."""
        click.echo(text, err=True)

    def note(self, text: str) -> None:
        """Print it."""
        note(text)

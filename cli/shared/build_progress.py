"""Progress of a build on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from starling.cli.shared.output import note

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

    from starling.engine.backends.tensorrt.build.monitor import BuildProgress


@contextmanager
def build_progress(*, terminal: bool) -> Iterator[BuildProgress]:
    """What the builder reports to, for as long as the block lasts."""
    if not terminal:
        yield Lines()
        return
    shown = Bars()
    try:
        yield shown
    finally:
        shown.stop()


class Lines:
    """A line for each phase."""

    def phase(self, text: str) -> None:
        """Print it."""
        click.echo(text, err=True)

    def steps(self, done: int, total: int) -> None:
        """Nothing: a log wants no thousand lines."""

    def note(self, text: str) -> None:
        """Print it."""
        note(text)


class Bars:
    """One bar: the phase, how much of it is done, and the seconds since it began."""

    def __init__(self) -> None:
        from rich import progress

        self._bar: Bar = progress.Progress(
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TimeElapsedColumn(),
            transient=True,
            console=_stderr(),
        )
        self._bar.start()
        self._task = self._bar.add_task("", total=None)

    def phase(self, text: str) -> None:
        """Show the phase in place of the one before."""
        self._bar.reset(self._task, total=None, description=text)

    def steps(self, done: int, total: int) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=done, total=total)

    def note(self, text: str) -> None:
        """A line above the bar."""
        self._bar.console.print(text, style="dim", highlight=False, markup=False)

    def stop(self) -> None:
        """Clear the line."""
        self._bar.stop()


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True)

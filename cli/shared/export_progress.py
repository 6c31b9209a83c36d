"""Progress of an export on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.status import Status

    from starling.export.exporter import Progress


@contextmanager
def export_progress(*, terminal: bool) -> Iterator[Progress]:
    """What the exporter reports to, for as long as the block lasts."""
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

    def bytes(self, done: int, total: int) -> None:
        """Nothing: a log wants no thousand lines."""


class Bars:
    """A spinner with the phase; a bar with bytes, speed and time left while bytes are counted."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._phase = ""
        self._spinner: Status | None = None
        self._bar: Bar | None = None

    def phase(self, text: str) -> None:
        """Show the phase in place of the one before."""
        self.stop()
        self._phase = text
        self._spinner = self._console.status(text)
        self._spinner.start()

    def bytes(self, done: int, total: int) -> None:
        """Move the bar."""
        if self._bar is None:
            self.stop()
            self._bar = _byte_bar(self._console)
            self._bar.add_task(self._phase, total=total)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done, total=total)

    def stop(self) -> None:
        """Clear the line."""
        if self._spinner is not None:
            self._spinner.stop()
        if self._bar is not None:
            self._bar.stop()
        self._spinner, self._bar = None, None


def _byte_bar(console: Console) -> Bar:
    from rich import progress

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("left"),
        console=console,
        transient=True,
    )

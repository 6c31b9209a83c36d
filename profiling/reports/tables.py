"""Tables and facts for a terminal of any width, rendered with rich: no figure is cut, whatever the room."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.table import Table
from rich.text import Text

from starling.profiling.reports.folding import fold

#: Spaces between columns, and where the table is too wide by that.
_GAP, _NARROW_GAP = 2, 1


class Figures:
    """A table whose figures stay whole: columns that do not fit go on below, beside the same first columns."""

    def __init__(
        self, headings: Sequence[str], rows: Iterable[Sequence[str | Text]], *, names: int = 1, title: str = ""
    ) -> None:
        """The first `names` columns say what a row is; every other one holds figures."""
        self._headings = [Text(heading) for heading in headings]
        self._rows = [[cell if isinstance(cell, Text) else Text(cell) for cell in row] for row in rows]
        self._names, self._title = names, title

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._title:
            yield Text(self._title, "bold")
        room, columns = options.max_width, list(range(len(self._headings)))
        if self._room(columns, _GAP) <= room:
            yield self._table(columns, _GAP)
        elif self._room(columns, _NARROW_GAP) <= room:
            yield self._table(columns, _NARROW_GAP)
        else:
            for number, block in enumerate(self._blocks(room)):
                yield from [Text()] if number else []
                yield self._table(block, _GAP)

    def _blocks(self, room: int) -> Iterator[list[int]]:
        """The columns of each block, the names among them; a block has at least one of figures."""
        names = list(range(self._names))
        block: list[int] = []
        for column in range(self._names, len(self._headings)):
            if block and self._room([*names, *block, column], _GAP) > room:
                yield [*names, *block]
                block = []
            block.append(column)
        yield [*names, *block]

    def _room(self, columns: Sequence[int], gap: int) -> int:
        widths = [
            max(cell_len(cell.plain) for cell in (self._headings[column], *(row[column] for row in self._rows)))
            for column in columns
        ]
        return sum(widths) + gap * (len(widths) - 1)

    def _table(self, columns: Sequence[int], gap: int) -> Table:
        # Between two columns of this box lies one space; the padding is the rest.
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, gap - 1, 0, 0))
        for column in columns:
            justify: JustifyMethod = "left" if column == 0 and self._names == 1 else "right"
            table.add_column(self._headings[column], justify=justify, no_wrap=column >= self._names)
        for row in self._rows:
            table.add_row(*(row[column] for column in columns))
        return table


class Facts:
    """A line for each name and its text; a long one goes on below its own beginning."""

    def __init__(self, rows: Mapping[str, str], style: str = "") -> None:
        self._rows, self._style = rows, style

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(map(cell_len, self._rows), default=0) + _GAP
        for name, text in self._rows.items():
            first, *others = fold(text, max(options.max_width - width, 1), cut_words=True)
            yield Text(name.ljust(width) + first, self._style)
            yield from (Text(" " * width + line, self._style) for line in others)

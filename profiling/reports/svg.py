"""Small SVG drawings: axes, and marks in their coordinates. Colours are CSS classes, so that a page can be dark."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from math import ceil, floor, log10

WIDTH, HEIGHT = 500, 270
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 14, 46
#: Height of a line of text, the widest that its characters are on average, and how far it stays from what it names.
LINE, CHARACTER, BESIDE = 14, 7.2, 4


@dataclass(frozen=True, slots=True)
class Axis:
    """A linear or logarithmic axis from `low` to `high`; `label` names it with its unit."""

    low: float
    high: float
    label: str
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value lies between the ends, 0 … 1."""
        if self.log:
            return (log10(value) - log10(self.low)) / (log10(self.high) - log10(self.low))
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round values in its range: powers of ten on a logarithmic axis, else 1, 2 or 5 of a power."""
        if self.log:
            return [10.0**power for power in range(ceil(log10(self.low) - 1e-9), floor(log10(self.high) + 1e-9) + 1)]
        rough = (self.high - self.low) / 5
        power = 10.0 ** floor(log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
        first = ceil(self.low / step - 1e-9)
        return [step * i for i in range(first, floor(self.high / step + 1e-9) + 1)]


@dataclass(slots=True)
class Plot:
    """A drawing with two axes; marks are given in their values."""

    x: Axis
    y: Axis
    height: int = HEIGHT
    #: Room above the plot, for what `rules` says.
    head: int = 0
    _marks: list[str] = field(default_factory=list)

    def px(self, value: float) -> float:
        """Horizontal place of a value, in the drawing's units."""
        return LEFT + self.x.place(value) * (WIDTH - LEFT - RIGHT)

    def py(self, value: float) -> float:
        """Vertical place of a value."""
        return self.height - BOTTOM - self.y.place(value) * (self.height - TOP - self.head - BOTTOM)

    def line(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        """A line through the points."""
        self._marks.append(f'<polyline class="{kind}" points="{self._points(points)}"/>')

    def area(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        """A closed area."""
        self._marks.append(f'<polygon class="{kind}" points="{self._points(points)}"/>')

    def bar(self, left: float, right: float, value: float, kind: str, title: str) -> None:
        """A bar from the horizontal axis up; `title` shows when it is pointed at."""
        x, width, top = self.px(left), self.px(right) - self.px(left), self.py(value)
        height = self.py(self.y.low) - top
        self._marks.append(
            f'<rect class="{kind}" x="{x + 0.5:.1f}" y="{top:.1f}" width="{max(width - 1, 0.5):.1f}" '
            f'height="{height:.1f}"><title>{escape(title)}</title></rect>'
        )

    def dot(self, x: float, y: float, kind: str, title: str, label: str = "", *, left: bool = False) -> None:
        """A dot, with a label beside it where one is given."""
        px, py = self.px(x), self.py(y)
        self._marks.append(
            f'<circle class="{kind}" cx="{px:.1f}" cy="{py:.1f}" r="5"><title>{escape(title)}</title></circle>'
        )
        if label:
            self._marks.append(_text(px - 9 if left else px + 9, py + 4, label, "end" if left else "start"))

    def rules(self, rules: Sequence[tuple[float, str]]) -> None:
        """Vertical lines with their names above the plot, from left to right, each a line of text below the one before.

        So a name lies above the lines to its right; the axis must end where the last names have room.
        """
        for level, (x, label) in enumerate(rules):
            px, top = self.px(x), LINE * level + BESIDE
            self._marks.append(
                f'<line class="rule" x1="{px:.1f}" x2="{px:.1f}" y1="{top}" y2="{self.height - BOTTOM}"/>'
            )
            self._marks.append(_text(px + BESIDE, top + LINE - BESIDE, label, "start"))

    def names(self, ends: Sequence[tuple[tuple[float, float], str]]) -> None:
        """A name beside the end of each line; those that would overlap are moved apart, upwards from the lowest."""
        lowest = float(self.height - BOTTOM + LINE)
        for (x, y), label in sorted(ends, key=lambda end: end[0][1]):
            lowest = min(self.py(y) + BESIDE, lowest - LINE)
            self._marks.append(_text(self.px(x) + 2 * BESIDE, lowest, label, "start"))

    def text(self, x: float, y: float, label: str, anchor: str = "start") -> None:
        """Words at a place."""
        self._marks.append(_text(self.px(x), self.py(y), label, anchor))

    def render(self, title: str, tick: Callable[[float], str] = lambda value: f"{value:g}") -> str:
        """The drawing as an <svg> element; `title` is what a screen reader says."""
        floor_y = self.height - BOTTOM
        grid = []
        for value in self.y.ticks():
            y = self.py(value)
            grid.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            grid.append(_text(LEFT - 8, y + 4, tick(value), "end"))
        for value in self.x.ticks():
            x = self.px(value)
            grid.append(f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{floor_y}" y2="{floor_y + 4}"/>')
            grid.append(_text(x, floor_y + 18, tick(value), "middle"))
        grid.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor_y}" y2="{floor_y}"/>')
        grid.append(_text((LEFT + WIDTH - RIGHT) / 2, self.height - 8, self.x.label, "middle", "label"))
        middle = (TOP + self.head + floor_y) / 2
        grid.append(
            f'<text class="label" transform="translate(14 {middle:.0f}) rotate(-90)" text-anchor="middle">'
            f"{escape(self.y.label)}</text>"
        )
        return (
            f'<svg viewBox="0 0 {WIDTH} {self.height}" role="img" aria-label="{escape(title)}">'
            f"{''.join(grid)}{''.join(self._marks)}</svg>"
        )

    def _points(self, points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{self.px(x):.1f},{self.py(y):.1f}" for x, y in points)


def rules_head(rules: int) -> int:
    """Room above a plot for the names of so many rules."""
    return LINE * rules - TOP + BESIDE if rules else 0


def end_with_room(low: float, high: float, labels: Iterable[tuple[float, str]]) -> float:
    """Where a linear axis from `low` ends so that every label, at its value and to the right of it, fits into it."""
    width = WIDTH - LEFT - RIGHT
    ends = [low + (x - low) * width / (width - 2 * BESIDE - CHARACTER * len(label)) for x, label in labels]
    return max(high, *ends) if ends else high


def _text(x: float, y: float, content: str, anchor: str, kind: str = "") -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<text{name} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'

"""A few shapes and scales of SVG, enough for the plots of a report. Colours are CSS classes, so that dark mode is CSS."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

Scale = Callable[[float], float]


class Figure:
    """One picture of `width` × `height` units, drawn at that size or smaller, with words for those who cannot see it."""

    def __init__(self, width: int, height: int, title: str, words: str):
        self.width, self.height = width, height
        self._title, self._words = title, words
        self._parts: list[str] = []

    def add(self, tag: str, css: str = "", title: str = "", **attributes: object) -> None:
        """One shape. `title` is what a pointer that rests on it sees."""
        words = "".join(f' {name.replace("_", "-")}="{_number(value)}"' for name, value in attributes.items())
        css = f' class="{css}"' if css else ""
        inside = f"<title>{escape(title)}</title>" if title else ""
        self._parts.append(f"<{tag}{css}{words}>{inside}</{tag}>" if inside else f"<{tag}{css}{words}/>")

    def text(self, x: float, y: float, words: str, css: str = "", anchor: str = "start", turn: bool = False) -> None:
        """Words at a point; `turn` writes them upwards."""
        where = f' transform="rotate(-90 {_number(x)} {_number(y)})"' if turn else ""
        css = f' class="{css}"' if css else ""
        self._parts.append(
            f'<text x="{_number(x)}" y="{_number(y)}" text-anchor="{anchor}"{css}{where}>{escape(words)}</text>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str) -> None:
        """A straight line."""
        self.add("line", css, x1=x1, y1=y1, x2=x2, y2=y2)

    def path(self, points: Sequence[tuple[float, float]], css: str) -> None:
        """An open line through points."""
        steps = "L".join(f"{_number(x)} {_number(y)}" for x, y in points)
        if points:
            self.add("path", css, d=f"M{steps}")

    def __str__(self) -> str:
        label = escape(f"{self._title}. {self._words}", quote=True)
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}" role="img" '
            f'aria-label="{label}" xmlns="http://www.w3.org/2000/svg"><desc>{escape(self._words)}</desc>'
            + "".join(self._parts)
            + "</svg>"
        )


def _number(value: object) -> str:
    if not isinstance(value, float | int):
        return escape(str(value), quote=True)
    return f"{value:.2f}".rstrip("0").rstrip(".")


def linear(domain: tuple[float, float], room: tuple[float, float]) -> Scale:
    """Values of `domain` to units in `room`."""
    (low, high), (start, end) = domain, room
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def logarithmic(domain: tuple[float, float], room: tuple[float, float]) -> Scale:
    """The same by orders of magnitude; both ends are above 0."""
    scale = linear((math.log10(domain[0]), math.log10(domain[1])), room)
    return lambda value: scale(math.log10(max(value, domain[0] * 1e-3)))


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`."""
    span = high - low
    if not span > 0:
        return [low]
    step = 10.0 ** math.floor(math.log10(span / about))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= about)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten from `low` to `high`; where that is fewer than two, also twice and five times those."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [10.0**exponent * factor for exponent in exponents for factor in factors]
        inside = [value for value in found if low * 0.999 <= value <= high * 1.001]
        if len(inside) >= 3:
            break
    return inside


def layer_ticks(layers: int, about: int = 8) -> list[int]:
    """Indices of layers to label; the last one always is."""
    if layers <= about:
        return list(range(layers))
    step = next(step for step in (2, 4, 5, 8, 10, 16, 20, 50, 100) if layers / step <= about)
    marks = list(range(0, layers, step))
    if layers - 1 - marks[-1] < step / 2:
        marks.pop()
    return [*marks, layers - 1]

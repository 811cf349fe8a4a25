"""Shapes and scales of SVG for the plots of a report. Colours are CSS classes, so that CSS can switch to dark mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

Scale = Callable[[float], float]


class Chart:
    """One picture with a description for screen readers.

    Args:
        width: in units, which are CSS pixels where there is room.
        height: in the same units.
        title: name of the picture.
        words: description of its content.
    """

    def __init__(self, width: int, height: int, title: str, words: str):
        """Begin an empty picture."""
        self.width, self.height = width, height
        self._title, self._words = title, words
        self._parts: list[str] = []

    def add(self, tag: str, css: str = "", title: str = "", **attributes: object) -> None:
        """Add one shape.

        Args:
            tag: element of SVG.
            css: classes.
            title: text that a browser shows while a pointer rests on the shape.
            attributes: of the element, with `_` for `-`.
        """
        words = "".join(f' {name.replace("_", "-")}="{_number(value)}"' for name, value in attributes.items())
        css = f' class="{css}"' if css else ""
        inside = f"<title>{escape(title)}</title>" if title else ""
        self._parts.append(f"<{tag}{css}{words}>{inside}</{tag}>" if inside else f"<{tag}{css}{words}/>")

    def text(self, x: float, y: float, words: str, css: str = "", anchor: str = "start", turn: bool = False) -> None:
        """Add words at a point.

        Args:
            x: of the anchor.
            y: of the baseline.
            words: the text.
            css: classes.
            anchor: start, middle or end.
            turn: whether to write upwards.
        """
        where = f' transform="rotate(-90 {_number(x)} {_number(y)})"' if turn else ""
        css = f' class="{css}"' if css else ""
        self._parts.append(
            f'<text x="{_number(x)}" y="{_number(y)}" text-anchor="{anchor}"{css}{where}>{escape(words)}</text>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str) -> None:
        """Add a straight line."""
        self.add("line", css, x1=x1, y1=y1, x2=x2, y2=y2)

    def path(self, points: Sequence[tuple[float, float]], css: str) -> None:
        """Add an open line through points."""
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
    # A hundredth of a pixel is not visible; more digits would only lengthen the page.
    return f"{value:.2f}".rstrip("0").rstrip(".")


def linear(domain: tuple[float, float], extent: tuple[float, float]) -> Scale:
    """A scale that maps `domain` linearly to `extent`, in units of the picture."""
    (low, high), (start, end) = domain, extent
    # A domain of a single value has no width to divide by.
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def logarithmic(domain: tuple[float, float], extent: tuple[float, float]) -> Scale:
    """A scale that maps the logarithm of `domain`, whose ends are above 0, to `extent`."""
    scale = linear((math.log10(domain[0]), math.log10(domain[1])), extent)
    # Values of 0 have no logarithm; they come to lie far outside the picture.
    return lambda value: scale(math.log10(max(value, domain[0] * 1e-3)))


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """About `about` round numbers from `low` to `high`."""
    span = high - low
    if not span > 0:
        return [low]
    step = 10.0 ** math.floor(math.log10(span / about))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= about)
    # An end that is a multiple of the step must not be lost to rounding; nor may 3 × 0.1 print as 0.30000000000000004.
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten from `low` to `high`; where these are fewer than three, also three times, or two and five times, those."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        values = [10.0**exponent * factor for exponent in exponents for factor in factors]
        # An end that is a power of ten must not be lost to rounding.
        inside = [value for value in values if low * 0.999 <= value <= high * 1.001]
        if len(inside) >= 3:
            break
    return inside


def layer_ticks(layers: int, about: int = 8) -> list[int]:
    """Indices of layers to label, the first and the last among them."""
    if layers <= about:
        return list(range(layers))
    step = next(step for step in (2, 4, 5, 8, 10, 16, 20, 50, 100) if layers / step <= about)
    marks = list(range(0, layers, step))
    # The last two labels would touch each other.
    if layers - 1 - marks[-1] < step / 2:
        marks.pop()
    return [*marks, layers - 1]

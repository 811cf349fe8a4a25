"""The console that all tables and lines are printed on: names are text there, never markup or control codes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from mla_convert.core.errors import ReaderGone
from mla_convert.core.words import shown


class Terminal(Console):
    """A console of rich that takes what it is given for plain text."""

    def __init__(self, stderr: bool = False, **options: Any):
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """A string as text, without control characters: spelled out before widths are measured."""
        return super().render_str(shown(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich does; what is no control code of its own holds none."""
        for part in super().render(renderable, options):
            yield part if part.control else Segment(shown(part.text), part.style)

    def on_broken_pipe(self) -> None:
        """Nobody reads any more.

        Raises:
            ReaderGone: always.
        """
        raise ReaderGone

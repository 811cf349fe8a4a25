"""The console that prints all tables and lines: it shows names as text, never as markup or control codes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from mla_convert.core.errors import ReaderGone
from mla_convert.core.words import shown


class Terminal(Console):
    """A rich console that takes every string as plain text."""

    def __init__(self, stderr: bool = False, **options: Any):
        """Open a console.

        Args:
            stderr: Print on stderr instead of stdout.
            **options: As rich's `Console` takes them.
        """
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """A string as rich text; control characters are spelled out before widths are measured."""
        return super().render_str(shown(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Segments as rich renders them; all but its own control codes are without control characters."""
        for part in super().render(renderable, options):
            # Control segments are rich's own, which redraw a live bar; control characters in text come from names and
            # messages.
            yield part if part.control else Segment(shown(part.text), part.style)

    def on_broken_pipe(self) -> None:
        """Called by rich when the reader of the stream has closed it.

        Raises:
            ReaderGone: Always.
        """
        raise ReaderGone

"""One model for all tables: rows of text, printed on a terminal, in Markdown or in HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mla_convert.core.words import shown

if TYPE_CHECKING:
    import rich.table
    from rich.console import Console

Row = Sequence[str]


@dataclass(frozen=True)
class Table:
    """Rows of cells.

    Attributes:
        columns: names of the columns; empty for a table without a head.
        rows: cells, as many as columns.
        title: above the table on a terminal.
        align: for each column "l" (left), "r" (right) or "c" (left, code); by default the first is left and others are right.
        bold: index of a row to emphasise.
    """

    columns: Sequence[str]
    rows: Sequence[Row]
    title: str = ""
    align: str = ""
    bold: int | None = None

    @property
    def alignment(self) -> str:
        """The alignment of every column."""
        return self.align or "l" + "r" * (len(self.columns) - 1)

    def rich(self, **options: object) -> rich.table.Table:
        """For a terminal. `options` are those of `rich.table.Table`."""
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title=Text(shown(self.title)) if self.title else None, title_justify="left", **options)  # type: ignore[arg-type]
        for name, align in zip(self.columns, self.alignment, strict=True):
            table.add_column(name, justify="right" if align == "r" else "left")
        for index, row in enumerate(self.rows):
            # As `Text`: rich reads a string as markup, and a model may be called `[red]`.
            table.add_row(*(Text(shown(cell)) for cell in row), style="bold" if index == self.bold else None)
        return table

    def markdown(self) -> str:
        """For a model card. Cells are not escaped: give no text of a stranger's."""
        rule = "|".join("---:" if align == "r" else "---" for align in self.alignment)
        head = "|".join(f" {name} " if name else " " for name in self.columns)
        lines = [f"|{head}|", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in self.rows)]
        return "\n".join(lines)


def print_lines(lines: Iterable[str], console: Console) -> None:
    """Sentences below a table: not wrapped, not highlighted, no markup."""
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

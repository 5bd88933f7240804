"""A table of text, drawn on a console or written in Markdown."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from html import escape

import rich.table
from rich.text import Text


@dataclass(frozen=True)
class Table:
    """Cells below headers: `console.print(table)` draws them, `table.markdown()` and `table.html()` write them.

    headers: one a column. rows: cells of any type, shown by str; a rich Text keeps its style on a console. A row may end
    early, and an empty row is a line across. title, caption: above and below the table, on a console alone. left: headers
    of the columns that are set left, the others are set right; None: the first.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[object]]
    title: str = ""
    caption: str = ""
    left: Collection[str] | None = None

    def _is_left(self, header: str) -> bool:
        return header in (self.headers[:1] if self.left is None else self.left)

    def __rich__(self) -> rich.table.Table:
        """Return the table as rich draws it. Nothing in a cell is taken for markup, and nothing is cut."""
        table = rich.table.Table(title=Text(self.title) if self.title else None, title_justify="left")
        table.caption = Text(self.caption) if self.caption else None
        for header in self.headers:
            table.add_column(Text(header), justify="left" if self._is_left(header) else "right", overflow="fold")
        for row in self.rows:
            if row:
                table.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
            else:
                table.add_section()
        return table

    def markdown(self) -> str:
        """Return the lines of the table in Markdown, each with its end."""
        rule = ["---" if self._is_left(header) else "---:" for header in self.headers]
        filled = ([*row, *[""] * (len(rule) - len(row))] for row in self.rows if row)
        return "".join(f"| {' | '.join(map(_escaped, cells))} |\n" for cells in (self.headers, rule, *filled))

    def html(self) -> str:
        """Return the table in HTML."""

        def line(kind: str, cells: Sequence[object]) -> str:
            sides = [' class="left"' if self._is_left(header) else "" for header in self.headers]
            filled = [*cells, *[""] * (len(sides) - len(cells))]
            pairs = zip(sides, filled, strict=True)
            return "<tr>" + "".join(f"<{kind}{side}>{escape(str(cell))}</{kind}>" for side, cell in pairs) + "</tr>"

        head = [line("th", self.headers)] * any(self.headers)
        return "\n".join(["<table>", *head, *(line("td", row) for row in self.rows if row), "</table>\n"])


def _escaped(cell: object) -> str:
    return str(cell).replace("|", "\\|").replace("\n", " ")

"""The one table: on a console and in Markdown."""

from __future__ import annotations

import io

from rich.console import Console
from rich.text import Text

from ect.show.table import Table

TABLE = Table(
    ["sampler", "NFE", "why"],
    [["[Heun] a|b", 35, Text("slow\nand sure", "red")], [], ["ECT", 2]],
    "Frechet [distance]",
    "of one seed",
    left=("sampler", "why"),
)


def drawn(table: Table, width: int = 100, colour: bool = False) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=colour)
    console.print(table)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_a_console_shows_every_cell_as_it_is() -> None:
    lines = drawn(TABLE)
    assert "Frechet [distance]" in lines[0] and "of one seed" in lines[-1]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert cells == [["[Heun] a|b", "35", "slow"], ["", "", "and sure"], ["ECT", "2", ""]]
    assert [line[0] for line in lines[1:-1]] == list("┏┃┡││├│└")  # the empty row is a line across
    assert "│ ECT        │   2 │" in "\n".join(lines)  # numbers stand right
    assert any("\x1b[31mslow" in line for line in drawn(TABLE, colour=True))


def test_nothing_is_cut_on_a_narrow_console() -> None:
    lines = drawn(Table(["name"], [["abcdefghijklmnop"]]), width=12)
    assert "".join(line.strip("│ ") for line in lines if line.startswith("│")) == "abcdefghijklmnop"


def test_markdown_escapes_what_would_break_it() -> None:
    assert TABLE.markdown().splitlines() == [
        "| sampler | NFE | why |",
        "| --- | ---: | --- |",
        "| [Heun] a\\|b | 35 | slow and sure |",
        "| ECT | 2 |  |",
    ]
    assert Table(["a", "b"], []).markdown() == "| a | b |\n| --- | ---: |\n"

"""Answer in the terminal."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import rich.table
from rich import box
from rich.console import Console
from rich.text import Text

from titan_moe_lb.commands.answer.answer import Answer, Cell, Table

PIPE_WIDTH = 130
NAME_WIDTH = 16


def print_answer(answer: Answer, console: Console | None = None) -> None:
    """Print the sentences and tables, at a fixed width into a file or a pipe."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(width=PIPE_WIDTH, file=console.file)
    _print_lines(console, [*answer.verdict, *answer.headline])
    for table in answer.tables:
        console.print(f"\n{table.title}", style="bold", highlight=False, markup=False)
        _print_lines(console, table.text)
        console.print(_drawn(table))
        _print_lines(console, table.notes)


def _print_lines(console: Console, lines: Iterable[str]) -> None:
    """Print each line without wrapping, so that grep finds it in a pipe."""
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _drawn(table: Table) -> rich.table.Table:
    drawn = rich.table.Table(box=box.SIMPLE)
    shown = [column.on_terminal is not None for column in table.columns]
    for column in itertools.compress(table.columns, shown):
        wraps = column.is_name or column.is_text
        drawn.add_column(
            column.on_terminal or column.heading,
            justify="left" if wraps else "right",
            overflow="fold",
            no_wrap=column.show is str and not wraps,
            min_width=NAME_WIDTH if column.is_name else None,
        )
    for rows in table.groups:
        for row in rows:
            drawn.add_row(*map(_styled, itertools.compress(table.cells(row), shown)))
        drawn.add_section()
    return drawn


def _styled(cell: Cell) -> Text:
    text = Text(cell.text, style="red" if cell.is_bad else "bold" if cell.is_best else "")
    if cell.note:
        text.append(f"\n{cell.note}", style="dim")
    return text

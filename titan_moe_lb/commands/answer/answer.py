"""Answer of a command as data: sentences, tables and charts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from titan_moe_lb.pages.cards import Card
from titan_moe_lb.pages.charts import Chart


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a table."""

    title: str
    unit: str = ""
    show: Callable[[Any], str] = str
    """Format of a value. In the terminal, only names and columns with their own format wrap."""
    on_terminal: str | None = ""
    """Shorter heading in the terminal; None leaves the column out there."""
    is_name: bool = False
    """True for the name of a row, which is left-aligned and may wrap."""
    is_text: bool = False
    """True for sentences, which are left-aligned and may wrap."""

    @property
    def heading(self) -> str:
        """Title with its unit."""
        return f"{self.title} {self.unit}".strip()


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Value of a table with its own text, note or marks."""

    value: Any
    text: str = ""
    """Text that replaces the column's format."""
    note: str = ""
    """Second line, in small print."""
    link: str = ""
    """Place on the page that the text leads to."""
    is_bad: bool = False
    is_best: bool = False


Row = Sequence[Any]
"""A value or a :class:`Cell` for each column."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Table and the sentences around it."""

    title: str
    columns: Sequence[Column]
    groups: Sequence[Sequence[Row]]
    """Rows in groups, with a rule between groups."""
    text: list[str] = field(default_factory=list)
    """Sentences above the table."""
    legend: list[str] = field(default_factory=list)
    """Further sentences above the table, on the page only."""
    notes: Sequence[str] = ()
    """Sentences below the table."""
    key: str = ""
    """Key of the rows in JSON; empty if :attr:`Answer.numbers` contains them."""

    def cells(self, row: Row) -> list[Cell]:
        """Wrap every value of a row in a :class:`Cell` with its text."""
        cells = [value if isinstance(value, Cell) else Cell(value=value) for value in row]
        return [
            cell if cell.text else dataclasses.replace(cell, text=column.show(cell.value))
            for column, cell in zip(self.columns, cells, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Answer of one command."""

    kind: str
    """Kind of page, as in "Plan of a job"."""
    title: str
    cards: Sequence[Card] = ()
    """Numbers of the verdict, on the page only."""
    verdict: Sequence[str] = ()
    headline: Sequence[str] = ()
    """Model, devices and assumptions."""
    sections: Sequence[Table | Callable[[], Iterable[Chart]]]
    """Tables, and functions that draw charts for the page."""
    appendix: Sequence[Table] = ()
    """Tables at the end of the page, in no other output."""
    footer: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """All numbers, as plain data for JSON."""

    @property
    def tables(self) -> list[Table]:
        """Tables among the sections, in order."""
        return [section for section in self.sections if isinstance(section, Table)]

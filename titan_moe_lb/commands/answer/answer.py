"""An answer as data: sentences, tables and charts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from titan_moe_lb.pages.charts import Chart


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table."""

    title: str
    unit: str = ""
    show: Callable[[Any], str] = str
    """Text of a value. In the terminal, texts of columns without it are not folded."""
    on_terminal: str | None = ""
    """Shorter heading in the terminal; None leaves the column out there."""
    is_name: bool = False
    """Names what a row is about: left-aligned, and may be folded."""

    @property
    def heading(self) -> str:
        return f"{self.title} {self.unit}".strip()


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A value with more than its text."""

    value: Any
    text: str = ""
    """Text that replaces the column's own."""
    note: str = ""
    """Second line, in small letters."""
    is_bad: bool = False
    is_best: bool = False


Row = Sequence[Any]
"""A value or a :class:`Cell` for each column."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table and the sentences around it."""

    title: str
    columns: Sequence[Column]
    groups: Sequence[Sequence[Row]]
    """Rows; a rule divides the groups."""
    text: list[str] = field(default_factory=list)
    """Sentences above the table."""
    legend: list[str] = field(default_factory=list)
    """Further sentences above it, on the page alone."""
    notes: Sequence[str] = ()
    """Sentences below the table."""
    key: str = ""
    """Key of the rows in JSON; empty where :attr:`Answer.numbers` has them."""

    def cells(self, row: Row) -> list[Cell]:
        """The row with the text of every value."""
        cells = [value if isinstance(value, Cell) else Cell(value=value) for value in row]
        return [
            cell if cell.text else dataclasses.replace(cell, text=column.show(cell.value))
            for column, cell in zip(self.columns, cells, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer of one command."""

    kind: str
    """Kind of page, as in "Plan of a job"."""
    title: str
    verdict: Sequence[str] = ()
    headline: Sequence[str] = ()
    """Model, devices and assumptions."""
    sections: Sequence[Table | Callable[[], Iterable[Chart]]]
    """Tables, and functions that draw charts for the page."""
    appendix: Sequence[Table] = ()
    """Tables at the end of the page alone."""
    footer: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """All numbers, as plain data for JSON."""

    @property
    def tables(self) -> list[Table]:
        return [section for section in self.sections if isinstance(section, Table)]

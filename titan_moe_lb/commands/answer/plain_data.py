"""Answer as JSON."""

from __future__ import annotations

import json
import math
from typing import Any

from titan_moe_lb.commands.answer.answer import Answer, Cell, Table


def as_json(answer: Answer, indent: int = 2) -> str:
    """Convert the numbers of the answer and the rows of all tables with a key.

    Infinity and NaN become null.
    """
    rows = {table.key: _rows(table) for table in answer.tables if table.key}
    return json.dumps(_finite({**answer.numbers, **rows}), indent=indent, default=str)


def _rows(table: Table) -> list[dict[str, Any]]:
    headings = [column.heading for column in table.columns]
    return [
        {
            heading: value.value if isinstance(value, Cell) else value
            for heading, value in zip(headings, row, strict=True)
        }
        for rows in table.groups
        for row in rows
    ]


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value

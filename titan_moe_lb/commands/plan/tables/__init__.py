"""The tables of a plan, in order. A new one is a file here and a line below."""

from __future__ import annotations

from collections.abc import Callable

from titan_moe_lb.commands.answer.answer import Table
from titan_moe_lb.commands.plan.result import Plan
from titan_moe_lb.commands.plan.tables import (
    capacity,
    every_degree,
    measured_load,
    placement_age,
)

TABLES: tuple[Callable[[Plan], Table | None], ...] = (
    every_degree.table,
    measured_load.table,
    placement_age.table,
    capacity.table,
)
"""Each makes its table; None where the plan has nothing for it."""

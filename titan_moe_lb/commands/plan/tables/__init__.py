"""Tables of a plan, in order. A new table is one file here and one line below."""

from __future__ import annotations

from collections.abc import Callable

from titan_moe_lb.commands.answer.answer import Table
from titan_moe_lb.commands.plan.result import Plan
from titan_moe_lb.commands.plan.tables import (
    capacity,
    every_degree,
    measured_load,
    overruns,
    placement_age,
)

TABLES: tuple[Callable[[Plan], Table | None], ...] = (
    every_degree.table,
    measured_load.table,
    placement_age.table,
    capacity.table,
    overruns.table,
)
"""Functions that build one table each, or return None if the plan has no data for it."""

"""Tables of a plan, in order. A new table is one function here and one line below."""

from __future__ import annotations

from collections.abc import Callable

from titan_moe_lb.commands.answer.answer import Table
from titan_moe_lb.commands.plan.result import Plan
from titan_moe_lb.commands.plan.tables import buffers, every_degree, run_load

TABLES: tuple[Callable[[Plan], Table | None], ...] = (
    every_degree.table,
    run_load.measured_load,
    run_load.placement_age,
    buffers.capacity,
    buffers.overruns,
)
"""Functions that build one table each, or return None if the plan has no data for it."""

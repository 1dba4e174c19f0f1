"""A plan as one HTML file that needs no network."""

from __future__ import annotations

from titan_moe_lb.commands.plan import sentences, table
from titan_moe_lb.commands.plan.charts import charts
from titan_moe_lb.commands.plan.result import Plan
from titan_moe_lb.commands.plan.verdict import placed
from titan_moe_lb.pages import html_page


def render(plan: Plan) -> str:
    made = charts(plan)
    return html_page.render(
        "commands/plan/page.html.jinja",
        plan=plan,
        headline=table.headline(plan),
        columns=table.COLUMNS,
        cells=table.cells,
        fastest=table.fastest(plan),
        fits_up_to=table.fits_up_to,
        sentences=sentences,
        placed=placed,
        extra_tables=_extra_tables(plan),
        savings=table.savings,
        run_line=table.run_line(plan) if plan.run else None,
        charts=made,
        drawings=html_page.drawings(made),
    )


ExtraTable = tuple[str, str, tuple[str, ...], list[list[list[str]]]]
"""Title, text, columns, and the rows of each degree."""


def _extra_tables(plan: Plan) -> list[ExtraTable]:
    made: list[ExtraTable] = []
    if plan.run:
        rows = [table.stale_cells(degree) for degree in plan.degrees]
        made.append(("How long a placement lasts", table.STALE, table.STALE_COLUMNS, rows))
    if plan.degrees[0].capacity:
        rows = [table.capacity_cells(degree) for degree in plan.degrees]
        made.append(("Capacity", sentences.CAPACITY, table.CAPACITY_COLUMNS, rows))
    return made

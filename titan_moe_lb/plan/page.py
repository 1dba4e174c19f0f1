"""A plan as one HTML file that needs no network."""

from __future__ import annotations

from pathlib import Path

from titan_moe_lb.pages import html_page, output_file
from titan_moe_lb.plan import table
from titan_moe_lb.plan.figures import charts
from titan_moe_lb.plan.plan import Plan


def write_page(plan: Plan, output: Path) -> None:
    """Write the page. Raises ``JobError`` where the file cannot be written."""
    output_file.write(render(plan), output)


def render(plan: Plan) -> str:
    made = charts(plan)
    return html_page.render(
        "plan/page.html.jinja",
        plan=plan,
        headline=table.headline(plan),
        columns=table.COLUMNS,
        cells=table.cells,
        fastest=table.fastest(plan),
        verdict=table.verdict,
        bought=table.bought,
        run_line=table.run_line(plan) if plan.run else None,
        charts=made,
        drawings=html_page.drawings(made),
    )

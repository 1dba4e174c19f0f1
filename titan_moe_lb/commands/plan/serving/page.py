"""A deployment as one HTML file that needs no network."""

from __future__ import annotations

from titan_moe_lb.commands.plan.serving import table
from titan_moe_lb.commands.plan.serving.answer import Serving
from titan_moe_lb.commands.plan.serving.charts import charts
from titan_moe_lb.pages import html_page


def render(answer: Serving) -> str:
    made = charts(answer)
    return html_page.render(
        "commands/plan/serving/page.html.jinja",
        answer=answer,
        verdict=table.verdict(answer),
        headline=table.headline(answer),
        columns=table.COLUMNS,
        cells=table.cells,
        limits=table.limits,
        charts=made,
        drawings=html_page.drawings(made),
    )

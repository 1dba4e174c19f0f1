"""Answer as one HTML file that needs no network."""

from __future__ import annotations

from titan_moe_lb.commands.answer.answer import Answer, Table
from titan_moe_lb.pages import html_page
from titan_moe_lb.pages.charts import Chart


def render(answer: Answer) -> str:
    """Draw the charts and render the page."""
    sections: list[Table | Chart] = []
    for section in (*answer.sections, *answer.appendix):
        sections += [section] if isinstance(section, Table) else section()
    charts = [section for section in sections if isinstance(section, Chart)]
    return html_page.render(
        "commands/answer/page.html.jinja",
        answer=answer,
        sections=sections,
        drawings=html_page.drawings(charts),
    )

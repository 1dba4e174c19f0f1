"""A plan as one HTML file that needs no network."""

from __future__ import annotations

import json
import os
from pathlib import Path

import jinja2
from plotly.offline import get_plotlyjs

from titan_moe_lb.errors import JobError
from titan_moe_lb.plan import table
from titan_moe_lb.plan.command import Plan
from titan_moe_lb.plan.figures import charts
from titan_moe_lb.report.page import packed_text


def write_page(plan: Plan, output: Path) -> None:
    """Write the page. Raises ``JobError`` where the file cannot be written."""
    page = render(plan)
    partial = output.with_name(output.name + ".new")
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, output)
    except OSError as error:
        raise JobError(
            f"{output} cannot be written ({error.strerror}): name another file with --output"
        ) from None


def render(plan: Plan) -> str:
    made = charts(plan)
    figures = [json.loads(chart.figures[0].to_json()) for chart in made]
    environment = jinja2.Environment(
        # From the package's root: the style sheet is the report's.
        loader=jinja2.PackageLoader("titan_moe_lb", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("plan/page.html.jinja").render(
        plan=plan,
        headline=table.headline(plan),
        columns=table.COLUMNS,
        cells=table.cells,
        verdict=table.verdict,
        bought=table.bought,
        run_line=table.run_line(plan) if plan.run else None,
        charts=made,
        data=packed_text(json.dumps(figures)),
        plotly=packed_text(get_plotlyjs()),
    )

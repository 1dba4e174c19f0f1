"""The page of a study: one HTML file that needs neither a network nor the runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from titan_moe_lb.pages import html_page, output_file
from titan_moe_lb.study import figures, table
from titan_moe_lb.study.design import Study
from titan_moe_lb.study.results import Group
from titan_moe_lb.study.verdict import verdict


def write_page(study: Study, groups: Sequence[Group], output: Path) -> None:
    """Write the page. Raises ``JobError`` where the file cannot be written."""
    output_file.write(render(study, groups, output.parent.name), output)


def render(study: Study, groups: Sequence[Group], name: str) -> str:
    charts = figures.charts(groups, study.settings.balanced_below)
    return html_page.render(
        "study/page.html.jinja",
        name=name,
        study=study,
        groups=[
            {
                "group": group,
                "verdict": verdict(group),
                "columns": table.columns(group),
                "front": {setting.name for setting in group.front("max_violation")},
            }
            for group in groups
        ],
        row=table.row,
        outcome=table.outcome,
        bad=[
            result
            for group in groups
            for setting in group.settings
            for result in setting.results
            if result.measured is None
        ],
        charts=charts,
        drawings=html_page.drawings(charts),
    )

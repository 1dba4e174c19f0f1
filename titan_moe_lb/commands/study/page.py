"""The page of a study: one HTML file that needs neither a network nor the runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from titan_moe_lb.commands.study import table
from titan_moe_lb.commands.study.charts import charts
from titan_moe_lb.commands.study.design import Study
from titan_moe_lb.commands.study.results import Group
from titan_moe_lb.commands.study.verdict import verdict
from titan_moe_lb.pages import html_page, output_file


def write_page(study: Study, groups: Sequence[Group], output: Path) -> None:
    """Write the page. Raises ``JobError`` where the file cannot be written."""
    output_file.write(render(study, groups, output.parent.name), output)


def render(study: Study, groups: Sequence[Group], name: str) -> str:
    shown = charts(groups, study.settings.balanced_below)
    return html_page.render(
        "commands/study/page.html.jinja",
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
        charts=shown,
        drawings=html_page.drawings(shown),
    )

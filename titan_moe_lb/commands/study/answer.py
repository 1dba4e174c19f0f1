"""Answer of a study: tables of its settings, charts, and all numbers as plain data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from titan_moe_lb.commands.answer.answer import Answer, Cell, Column, Row, Table
from titan_moe_lb.commands.answer.words import number
from titan_moe_lb.commands.study.charts import charts
from titan_moe_lb.commands.study.design import Study
from titan_moe_lb.commands.study.results import Group, Result, Setting, Spread
from titan_moe_lb.commands.study.verdict import lowest, verdict
from titan_moe_lb.pages.cards import Card

TITLES = {
    "validation_loss": "validation loss",
    "training_loss": "training loss",
    "max_violation": "MaxVio",
    "micro_batch_max_violation": "MaxVio of a micro-batch",
    "steps_until_balanced": "steps until balanced",
    "specialisation": "specialisation",
    "step_slowdown": "step x balance",
    "step_seconds": "step s",
}
"""Titles of a setting's numbers."""

_ON_TERMINAL = {
    "validation_loss": "loss",
    "training_loss": "training loss",
    "max_violation": "MaxVio",
    "steps_until_balanced": "balanced at",
}
"""Shorter titles, which leave room for the names of the settings."""


def answer(study: Study, groups: Sequence[Group], name: str) -> Answer:
    """Convert a study to sentences, tables and charts."""
    settings = study.settings
    return Answer(
        kind="Study",
        title=name,
        cards=[card for group in groups for card in _cards(group)],
        headline=[settings.description] if settings.description else [],
        sections=[
            *map(_settings, groups),
            lambda: charts(groups, settings.balanced_below),
        ],
        appendix=[*_failures(groups), _what_was_run(study)],
        footer="Every number is in study.json beside this page; each cell is a run of its own in cells/.",
        numbers=_numbers(study, groups),
    )


def _cards(group: Group) -> list[Card]:
    """Make the cards of a model: its setting with the lowest loss, and the most even one."""
    model = f"; {group.name}" if group.name else ""
    cards = []
    for label, number_name in (("Lowest loss", group.loss), ("Most even load", "max_violation")):
        setting = lowest(group, number_name)
        if setting is not None:
            found = number(setting.spread(number_name).mean)
            cards.append(Card(label, setting.name, f"{TITLES[number_name]} {found}{model}"))
    return cards


def _settings(group: Group) -> Table:
    known = [name for name in TITLES if group.knows(name)]
    losses = {"validation_loss", "training_loss"} - {group.loss}
    front = {setting.name for setting in group.front("max_violation")}

    def row(index: int, setting: Setting) -> Row:
        return (
            index,
            Cell(value=setting.name, is_best=setting.name in front),
            *(in_words(setting.spread(name)) for name in known),
            _cells(setting),
        )

    return Table(
        title=group.name or "Settings",
        columns=(
            Column(title="#"),
            Column(title="setting", is_name=True),
            *(
                Column(
                    title=TITLES[name],
                    on_terminal=None if name in losses else _ON_TERMINAL.get(name),
                )
                for name in known
            ),
            Column(title="cells"),
        ),
        groups=[[row(*one) for one in enumerate(group.settings, start=1)]],
        legend=[
            verdict(group),
            "Mean over the seeds, and below it the lowest and highest. Bold: no setting is better in "
            "both loss and MaxVio.",
        ],
    )


def in_words(spread: Spread) -> Cell:
    """Format the mean over the seeds, with the lowest and highest below if they differ."""
    low, high = spread.low, spread.high
    if math.isnan(spread.mean):
        text = "–"
    elif math.isinf(high):  # in some seed the load was never balanced
        text = "never" if math.isinf(low) else f"{number(low, 4)} or never"
    else:
        text = number(spread.mean, 4)
    differs = math.isfinite(high) and number(low, 4) != number(high, 4)
    note = f"{number(low, 4)} to {number(high, 4)}" if differs else ""
    return Cell(value=spread.mean, text=text, note=note)


def _cells(setting: Setting) -> Cell:
    """Count the cells, or those that failed or diverged."""
    bad = [result.record.status for result in setting.results if not result.numbers]
    ends = ", ".join(f"{bad.count(status)} {status}" for status in dict.fromkeys(bad))
    return Cell(value=len(setting.results), text=ends, is_bad=bool(bad))


def _failures(groups: Sequence[Group]) -> list[Table]:
    rows = [
        (result.folder.cell.name, result.record.error or "its loss is not a number")
        for group in groups
        for setting in group.settings
        for result in setting.results
        if not result.numbers
    ]
    columns = (Column(title="cell", is_name=True), Column(title="error"))
    return [Table(title="Failed or diverged cells", columns=columns, groups=[rows])] if rows else []


def _what_was_run(study: Study) -> Table:
    notes = []
    if study.plan:
        job = study.plan.job
        of_job = (
            f"{' '.join(job)}, taken to be as unbalanced as the cell"
            if job
            else "the cell's own job under its last load"
        )
        notes = [
            f"Step times: {study.plan.ranks} × {study.plan.hardware} at EP {study.plan.ep}, as "
            f"titan-moe-lb plan predicts them for {of_job}."
        ]
    return Table(
        title="What was run",
        columns=(Column(title="axis", is_name=True), Column(title="values")),
        groups=[
            [
                (
                    axis.title,
                    f"{axis.low} to {axis.high}" if axis.is_range else ", ".join(axis.choices()),
                )
                for axis in study.axes
            ]
        ],
        text=[f"Every cell: {' '.join(study.settings.job)}"],
        notes=notes,
    )


def _numbers(study: Study, groups: Sequence[Group]) -> dict[str, Any]:
    """Collect all numbers of tables and page, by setting and by cell."""
    settings = [(group, setting) for group in groups for setting in group.settings]

    def of_setting(group: Group, setting: Setting) -> dict[str, Any]:
        names = next((list(result.numbers) for result in setting.results if result.numbers), [])
        return {
            "model": group.name,
            "setting": setting.name,
            "cells": len(setting.results),
            "numbers": {name: asdict(setting.spread(name)) for name in names},
        }

    def of_cell(result: Result) -> dict[str, Any]:
        return {**asdict(result.record), "numbers": result.numbers}

    return {
        "study": asdict(study.settings),
        "plan": asdict(study.plan) if study.plan else None,
        "settings": [of_setting(*one) for one in settings],
        "cells": [of_cell(result) for _group, setting in settings for result in setting.results],
    }

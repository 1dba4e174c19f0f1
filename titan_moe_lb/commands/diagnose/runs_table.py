"""Table of several runs, with a row for each, and what cannot be compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from titan_moe_lb.commands.answer.answer import Cell, Column, Row, Table
from titan_moe_lb.commands.answer.words import number
from titan_moe_lb.commands.diagnose.examined_run import ExaminedRun
from titan_moe_lb.commands.diagnose.finding import Severity
from titan_moe_lb.traces.run_names import RunNames

COLUMNS = (
    Column(title="run", is_name=True),
    Column(title="steps"),
    Column(title="loss"),
    Column(title="MaxVio"),
    Column(title="overload"),
    Column(title="dead"),
    Column(title="worst finding", is_text=True),
)
MOST_NAMED = 3
"""Most runs that a sentence about several runs names."""


def runs_table(runs: Sequence[ExaminedRun], names: RunNames, marks: Sequence[str] = ()) -> Table:
    """Make the table.

    Args:
        runs: the runs.
        names: their names.
        marks: marks of the runs on a page, which has a place for each; none in the terminal.
    """
    notes = comparability(runs, names.names)
    if names.not_named:
        notes = [f"The runs also differ in: {', '.join(names.not_named)}.", *notes]
    cells = [
        Cell(value=name, note=str(run.path.parent))
        for name, run in zip(names.names, runs, strict=True)
    ]
    if marks:
        cells = [
            replace(cell, value=f"{mark} {cell.value}", link=f"#run-{mark}")
            for mark, cell in zip(marks, cells, strict=False)
        ]
    return Table(
        title=f"{len(runs)} run{'s' * (len(runs) > 1)}",
        columns=COLUMNS,
        groups=[[_row(*one) for one in zip(cells, runs, strict=True)]],
        text=["Values of each run's last logged step; MaxVio is the mean over its layers."],
        notes=notes,
    )


def _row(name: Cell, run: ExaminedRun) -> Row:
    logged = f"{run.num_steps} {'read' if run.is_sample else 'logged'}"
    return (
        name,
        Cell(
            value=run.last_step,
            text=f"{run.first_step} to {run.last_step}",
            note=logged if run.ended else f"{logged}, runs or was cut off",
        ),
        Cell(value=run.loss, text=_number(run.loss, 4)),
        Cell(
            value=run.max_violation,
            text=number(run.max_violation),
            note=f"layer {run.worst_layer}: {number(run.worst_violation)}",
        ),
        Cell(value=run.overload, text=_number(run.overload)),
        Cell(
            value=run.dead_experts,
            text=f"{run.dead_experts} of {run.info.num_experts_M.sum()}",
        ),
        _worst(run),
    )


def _worst(run: ExaminedRun) -> Cell:
    if run.too_short:
        return Cell(value=None, text=f"none: {run.too_short}")
    if not run.diagnosis.findings:
        return Cell(value=None, text="none")
    worst, *others = run.diagnosis.findings
    kinds = ", ".join(one.kind.replace("_", " ") for one in others)
    return Cell(
        value=worst.kind,
        text=f"{worst.severity.name.lower()}: {worst.what}",
        note=f"and {kinds}" if kinds else "",
        is_bad=worst.severity is Severity.FAULT,
    )


def _number(value: float, digits: int = 3) -> str:
    return "–" if math.isnan(value) else number(value, digits)


def comparability(runs: Sequence[ExaminedRun], names: Sequence[str]) -> list[str]:
    """Name the values that cannot be compared, for runs of different shapes."""

    def of_each(describe: Callable[[ExaminedRun], str]) -> str:
        """Describe the runs by value; empty if all have the same one."""
        by_text: dict[str, list[str]] = {}
        for run, name in zip(runs, names, strict=True):
            by_text.setdefault(describe(run), []).append(name)
        return (
            ""
            if len(by_text) == 1
            else "; ".join(f"{text} ({_listed(of_text)})" for text, of_text in by_text.items())
        )

    def highest(run: ExaminedRun) -> str:
        return number(float((run.info.num_experts_M / run.info.top_k_M).max() - 1))

    found = {
        "Losses of different models cannot be compared": of_each(lambda run: run.info.title),
        "The largest possible MaxVio differs": of_each(highest),
        "The layers differ, so a layer or an expert of one run is not that of another": of_each(
            lambda run: f"{len(run.info.layers)} layers of {run.info.num_experts} experts"
        ),
        "The tokens of a step differ": of_each(lambda run: f"{run.tokens_per_step:,}"),
        "Overload factors are of different expert-parallel degrees": of_each(
            lambda run: str(run.info.ep)
        ),
    }
    return [f"{what}: {values}." for what, values in found.items() if values]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(f'"{name}"' for name in names[:MOST_NAMED]) + more

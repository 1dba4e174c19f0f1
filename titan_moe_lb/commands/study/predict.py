"""Step time of the planned job at the imbalance of each cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from titan_moe_lb.commands.plan.command import make_plan
from titan_moe_lb.commands.plan.plan_arguments import PlanArguments
from titan_moe_lb.commands.plan.result import Plan
from titan_moe_lb.commands.study.design import Prediction
from titan_moe_lb.commands.study.results import Result
from titan_moe_lb.costmodel.times.outcome import Outcome
from titan_moe_lb.errors import JobError


def add_prediction(prediction: Prediction, cells: Sequence[Result]) -> None:
    """Set the predicted step time and its ratio to balance of every cell that succeeded.

    If ``[plan]`` names a job, that job is planned with the cell's MaxVio as its imbalance.
    Otherwise the cell's own job is planned under the load of its last steps.

    Raises:
        JobError: the job cannot be planned.
    """
    good = [cell for cell in cells if cell.numbers]
    try:
        outcomes = _outcomes(prediction, good) if good else []
    except JobError as error:
        raise JobError(f"[plan]: {error}") from None
    for cell, outcome in zip(good, outcomes, strict=True):
        for name in ("step_seconds", "step_slowdown"):
            cell.numbers[name] = getattr(outcome, name)


def _outcomes(prediction: Prediction, cells: Sequence[Result]) -> list[Outcome]:
    if prediction.job:
        factors = ",".join(f"{1 + cell.numbers['max_violation']:.6f}" for cell in cells)
        plan = _plan(prediction, prediction.job, imbalance=factors)
        return [row.outcome for row in plan.degrees[0].rows]
    plans = [
        _plan(prediction, _without_layout(cell.folder.cell.flags), from_run=cell.folder.path)
        for cell in cells
    ]
    return [plan.degrees[0].measured[0].last for plan in plans]


def _without_layout(flags: Sequence[str]) -> list[str]:
    """Remove ``--parallelism`` flags, and their values if these are separate words."""
    kept: list[str] = []
    drops_value = False
    for word in flags:
        drops = word.startswith("--parallelism.")
        if not drops and (word.startswith("--") or not drops_value):
            kept.append(word)
        drops_value = drops and "=" not in word
    return kept


def _plan(prediction: Prediction, flags: Sequence[str], **asked: Any) -> Plan:
    return make_plan(
        PlanArguments(
            hardware=prediction.hardware,
            job_flags=tuple(flags),
            ranks=prediction.ranks,
            ep=str(prediction.ep),
            **{"imbalance": "1.0", **asked},
        )
    )

"""How long a step would take at the imbalance that a cell has measured."""

from __future__ import annotations

from collections.abc import Sequence

from titan_moe_lb.commands.plan.command import make_plan
from titan_moe_lb.commands.plan.plan_arguments import PlanArguments
from titan_moe_lb.commands.study.cell import CellFolder
from titan_moe_lb.commands.study.design import Prediction
from titan_moe_lb.commands.study.measure import Measured
from titan_moe_lb.errors import JobError


def step_seconds(
    prediction: Prediction, cells: Sequence[tuple[CellFolder, Measured]]
) -> list[tuple[float, float]]:
    """Seconds of a step, and their ratio to those at balance, of each cell.

    With a job of its own the prediction is of that job, whose fullest expert is as far above the
    mean as the cell's; without, of the cell's job under the load of its last steps.

    Raises:
        JobError: the job cannot be planned.
    """
    try:
        if prediction.job:
            return _of_job(prediction, [measured for _folder, measured in cells])
        return [_of_cell(prediction, folder) for folder, _measured in cells]
    except JobError as error:
        raise JobError(f"[plan]: {error}") from None


def _of_job(prediction: Prediction, cells: Sequence[Measured]) -> list[tuple[float, float]]:
    if not cells:
        return []
    factors = ",".join(f"{1 + measured.max_violation:.6f}" for measured in cells)
    plan = make_plan(_question(prediction, prediction.job, imbalance=factors))
    outcomes = [row.outcome for row in plan.degrees[0].rows]
    return [(outcome.step_seconds, outcome.step_slowdown) for outcome in outcomes]


def _of_cell(prediction: Prediction, folder: CellFolder) -> tuple[float, float]:
    flags = _without_layout(folder.cell.flags)
    plan = make_plan(_question(prediction, flags, from_run=folder.path))
    outcome = plan.degrees[0].measured[0].last
    return outcome.step_seconds, outcome.step_slowdown


def _without_layout(flags: Sequence[str]) -> list[str]:
    """The prediction has a layout of its own. A flag and its value may be two words."""
    kept: list[str] = []
    drops_value = False
    for word in flags:
        is_flag = word.startswith("--")
        if word.startswith("--parallelism."):
            drops_value = "=" not in word
        elif is_flag or not drops_value:
            kept.append(word)
            drops_value = False
        else:
            drops_value = False
    return kept


def _question(prediction: Prediction, flags: Sequence[str], **asked) -> PlanArguments:
    return PlanArguments(
        hardware=prediction.hardware,
        job_flags=tuple(flags),
        ranks=prediction.ranks,
        ep=str(prediction.ep),
        **{"imbalance": "1.0", **asked},
    )

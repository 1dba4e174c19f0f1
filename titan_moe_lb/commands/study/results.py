"""Results of a study: cells by setting, and settings by model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from titan_moe_lb.commands.study.cell import CellFolder, Record
from titan_moe_lb.commands.study.design import SEED, Study
from titan_moe_lb.commands.study.measure import Course, measure
from titan_moe_lb.errors import JobError

_MODEL_KEYS = {"module", "config", "job_config"}


@dataclass(frozen=True, kw_only=True)
class Result:
    """One cell that has ended."""

    folder: CellFolder
    record: Record
    numbers: dict[str, float]
    """Numbers of :func:`~titan_moe_lb.commands.study.measure.measure`, and step time and slowdown
    of the planned job; empty if the cell failed or diverged."""
    course: Course | None
    """None if the cell failed or diverged."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean, lowest and highest of a number over the seeds of a setting."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarize values; without any, all three numbers are NaN."""
        if not values:
            return cls(mean=math.nan, low=math.nan, high=math.nan)
        return cls(mean=float(np.mean(values)), low=min(values), high=max(values))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Cells that differ only in their seed."""

    name: str
    results: tuple[Result, ...]

    def spread(self, number: str) -> Spread:
        """Summarize a number over the cells that succeeded; NaN if one of them lacks it."""
        return Spread.of([one.numbers.get(number, math.nan) for one in self.results if one.numbers])

    @property
    def complete(self) -> bool:
        """True if every cell succeeded."""
        return all(result.numbers for result in self.results)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Settings of one model, which can be compared."""

    name: str
    """Name of the model on its axis; empty if all cells share one model."""
    settings: tuple[Setting, ...]

    @property
    def loss(self) -> str:
        """Name of the loss that ranks settings: validation loss if every setting has it."""
        has = [not math.isnan(s.spread("validation_loss").mean) for s in self.settings]
        return "validation_loss" if all(has) else "training_loss"

    def knows(self, number: str) -> bool:
        """Return True if at least one setting has the number."""
        return any(not math.isnan(setting.spread(number).mean) for setting in self.settings)

    def front(self, cost: str) -> list[Setting]:
        """Find the Pareto front of loss and ``cost``, by ascending cost.

        A setting is on the front if no other is better in one of the two and at least as good in
        the other. Settings with a failed cell are left out.
        """
        known = [s for s in self.settings if s.complete and math.isfinite(s.spread(cost).mean)]
        at = {s.name: (s.spread(cost).mean, s.spread(self.loss).mean) for s in known}

        def is_beaten(s: Setting) -> bool:
            x, y = at[s.name]
            return any(a <= x and b <= y and (a, b) != (x, y) for a, b in at.values())

        return sorted((s for s in known if not is_beaten(s)), key=lambda s: at[s.name])


def read_results(study: Study, folders: Iterable[CellFolder]) -> list[Result]:
    """Read the results of the cells that have ended."""
    results = []
    for folder in folders:
        record = folder.record()
        if record is None:
            continue
        numbers: dict[str, float] = {}
        course = None
        if record.status == "done":
            try:
                numbers, course = measure(folder.path, study.settings.balanced_below)
                numbers |= {"step_seconds": math.nan, "step_slowdown": math.nan}
            except JobError as error:
                record = replace(record, status="failed", error=str(error))
        results.append(Result(folder=folder, record=record, numbers=numbers, course=course))
    return results


def by_model(study: Study, results: Sequence[Result]) -> list[Group]:
    """Group the results by model and setting, in the order of the results."""
    of_model = [
        axis.title
        for axis in study.axes
        if any(
            _MODEL_KEYS & {key.replace("-", "_") for key in sets}
            for sets in axis.choices().values()
        )
    ]
    seeds = [axis.title for axis in study.axes if axis.key == SEED]

    def model(result: Result) -> str:
        return ", ".join(result.record.labels[title] for title in of_model)

    def setting(result: Result) -> str:
        labels = result.record.labels
        left = [title for title in labels if title not in (*of_model, *seeds)]
        if len(left) == 1:
            return labels[left[0]]
        return ", ".join(f"{title} {labels[title]}" for title in left) or "the job"

    return [
        Group(
            name=name,
            settings=tuple(
                Setting(name=title, results=tuple(cells))
                for title, cells in _grouped(of_group, setting)
            ),
        )
        for name, of_group in _grouped(results, model)
    ]


def _grouped(
    results: Iterable[Result], name: Callable[[Result], str]
) -> list[tuple[str, list[Result]]]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(name(result), []).append(result)
    return list(groups.items())

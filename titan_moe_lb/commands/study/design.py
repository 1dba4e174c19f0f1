"""File of a study: a job, the axes along which it varies, and how to run it."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from titan_moe_lb import toml_tables
from titan_moe_lb.commands.study.cell import Cell
from titan_moe_lb.errors import JobError

SEED = "debug.seed"
"""Key that repeats a cell: cells that differ only in it share a setting."""

MOST_CELLS = 10_000
"""Largest grid; more cells are probably a mistake."""

FARTHEST = 1e300
"""Largest absolute bound of a range, so that its width is finite too."""

MOST_LETTERS = 200
"""Most characters in the name of a cell, which is also its folder."""

RANKS = "ranks"
"""Key of an axis that sets the number of processes of a cell; it is no key of a job."""


@dataclass(kw_only=True)
class Axis:
    """``[[axis]]``: values of one key, a range of it, or named settings of several keys."""

    key: str = ""
    """Key of the job, as in model.aux_losses or optimizer.param_groups.0.optimizer_kwargs.lr."""
    values: list[Any] = field(default_factory=list)
    low: float | None = None
    """Lower end of a range, for any sampler except the grid."""
    high: float | None = None
    """Upper end of the range."""
    log: bool = False
    """Sample the range on a logarithmic scale."""
    name: str = ""
    """Name of the axis; default: the last part of its key."""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Keys that each named value sets; replaces ``key`` and ``values``."""

    @property
    def title(self) -> str:
        """Name of the axis, or the last part of its key."""
        return self.name or self.key.rpartition(".")[2]

    @property
    def is_range(self) -> bool:
        """True if the axis is a range."""
        return self.low is not None or self.high is not None

    def choices(self) -> dict[str, dict[str, Any]]:
        """List the keys that each value sets, by the name of the value."""
        if self.settings:
            return self.settings
        return {label(value): {self.key: value} for value in self.values}


@dataclass(kw_only=True)
class Prediction:
    """``[plan]``: job whose step time is predicted from the measured imbalance."""

    hardware: str
    """Device, as in ``titan-moe-lb plan --hardware``."""
    ep: int
    """Expert-parallel degree of the planned job."""
    ranks: int
    """Ranks of the planned job."""
    job: list[str] = field(default_factory=list)
    """Flags of another, larger job, which is assumed to be as unbalanced as the cell; default: the
    cell's own job under its measured load."""


@dataclass(kw_only=True)
class Settings:
    """``[study]``: how to run the cells."""

    job: list[str] = field(default_factory=list)
    """Flags of every cell, as for run_train.sh."""
    description: str = ""
    """One sentence for the page."""
    ranks: int = 1
    """Number of processes of a cell."""
    processes: int = 1
    """Number of cells that run at once."""
    threads: int = 1
    """Number of threads of each process of a cell."""
    balanced_below: float = 0.5
    """MaxVio (mean over layers) below which a step counts as balanced."""
    sampler: Literal["grid", "random", "tpe", "nsga2"] = "grid"
    """"grid" runs every combination. The others are samplers of Optuna, which choose ``trials``
    cells to lower the validation loss and MaxVio together."""
    trials: int = 0
    """Number of cells for any sampler except the grid."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Contents of the file."""

    settings: Settings
    axes: list[Axis]
    plan: Prediction | None

    def grid(self) -> list[Cell]:
        """List all combinations; the seeds of one setting follow one another."""
        axes = sorted(self.axes, key=lambda axis: axis.key == SEED)
        combinations = itertools.product(*(axis.choices().items() for axis in axes))
        titles = [axis.title for axis in axes]
        return [self.cell(dict(zip(titles, chosen, strict=True))) for chosen in combinations]

    def cell(self, chosen: dict[str, tuple[str, dict[str, Any]]]) -> Cell:
        """Build the cell with one value of each axis.

        ``chosen`` has the name of the value and the keys that it sets, by title of the axis.

        Raises:
            JobError: the number of ranks, the flags or the name of the cell is invalid.
        """
        keys: dict[str, Any] = {}
        for _name, sets in chosen.values():
            keys |= sets
        ranks = keys.pop(RANKS, self.settings.ranks)
        if type(ranks) is not int or ranks < 1:
            raise JobError(f"{RANKS} is {ranks!r}; it must be an integer of at least 1")
        words = [word for key, value in keys.items() for word in flag(key, value)]
        cell = Cell(
            labels={title: name for title, (name, _sets) in chosen.items()},
            seed=keys.get(SEED),
            flags=[*self.settings.job, *words],
            ranks=ranks,
        )
        for word in cell.flags:
            if "\0" in word:
                raise JobError(f"no command line can have the character 0: {word!r}")
        if len(cell.name) > MOST_LETTERS:
            raise JobError(
                f"the name of a cell has more than {MOST_LETTERS} letters, {cell.name[:40]}...: give "
                "long values short names, as in settings"
            )
        return cell


def read_study(path: Path) -> Study:
    """Read the file of a study.

    Raises:
        JobError: the file cannot be read, or a key or value is invalid.
    """
    tables = toml_tables.read(str(path), "study")
    named = {"study": dict, "axis": list, "plan": dict}
    for name, table in tables.items():
        if name not in named or not isinstance(table, named[name]):
            raise JobError(
                f"{path}: {name!r} is no part of a study: it has [study], [[axis]] and [plan]"
            )
    study = Study(
        settings=toml_tables.merge(Settings(), tables.get("study", {}), f"{path}: [study]"),
        axes=toml_tables.construct(list[Axis], tables.get("axis", []), f"{path}: axis"),
        plan=None
        if "plan" not in tables
        else toml_tables.build(Prediction, tables["plan"], f"{path}: [plan]"),
    )
    _check(study, str(path))
    return study


def _check(study: Study, path: str) -> None:
    settings = study.settings
    if not study.axes:
        raise JobError(
            f"{path}: nothing varies: add an axis, as in [[axis]] key = {SEED!r} values = [1, 2, 3]"
        )
    titles = [axis.title for axis in study.axes]
    for title in titles:
        if titles.count(title) > 1:
            raise JobError(f"{path}: two axes are called {title!r}: give one of them a name")
    for axis in study.axes:
        _check_axis(axis, settings.sampler, f"{path}: axis {axis.title!r}")
    counted = ["ranks", "processes", "threads", *(["trials"] * (settings.sampler != "grid"))]
    counts = [("study", name, getattr(settings, name)) for name in counted]
    if study.plan is not None:
        counts += [("plan", "ep", study.plan.ep), ("plan", "ranks", study.plan.ranks)]
    for table, name, number in counts:
        if number < 1:
            raise JobError(f"{path}: [{table}] {name} is {number}; at least 1")
    if settings.sampler == "grid":
        number = math.prod(len(axis.choices()) for axis in study.axes)
        if number > MOST_CELLS:
            raise JobError(
                f"{path}: {number} combinations are more than {MOST_CELLS:,}: give less values, or "
                'set sampler = "tpe" and trials in [study]'
            )
        try:
            names = Counter(cell.name for cell in study.grid())
        except JobError as error:
            raise JobError(f"{path}: {error}") from None
        name, most = names.most_common(1)[0]
        if most > 1:
            raise JobError(
                f"{path}: two cells are called {name!r}: name the settings of an axis apart"
            )


def _check_axis(axis: Axis, sampler: str, where: str) -> None:
    kinds = [bool(axis.values), axis.low is not None or axis.high is not None, bool(axis.settings)]
    named = axis.name and not axis.key if axis.settings else bool(axis.key)
    if kinds.count(True) != 1 or not named:
        raise JobError(
            f"{where} needs either key and values, or key and low and high, or name and settings"
        )
    try:
        choices = axis.choices()
    except JobError as error:
        raise JobError(f"{where}: {error}") from None
    if len(choices) < len(axis.values):
        raise JobError(f"{where} has one value twice: {axis.values}")
    if not axis.is_range:
        return
    if axis.low is None or axis.high is None or not -FARTHEST < axis.low < axis.high < FARTHEST:
        raise JobError(f"{where} needs a finite high above its low: {axis.low} to {axis.high}")
    if axis.log and axis.low <= 0:
        raise JobError(f"{where}: a logarithmic range needs a low above 0, not {axis.low}")
    if sampler == "grid":
        raise JobError(
            f"{where} is a range, of which a grid has no points: give values, or set sampler = "
            '"tpe" and trials in [study]'
        )


def label(value: Any) -> str:
    """Name a value of an axis."""
    return value if isinstance(value, str) else toml_tables.inline(value)


def flag(key: str, value: Any) -> list[str]:
    """Format the command-line words that set one key of a job."""
    if key.startswith("model."):
        return [f"--{key}={value if isinstance(value, str) else toml_tables.inline(value)}"]
    if isinstance(value, bool):
        section, dot, name = key.rpartition(".")
        return [f"--{key}" if value else f"--{section}{dot}no-{name}"]
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key.replace('_', '-') if '.' not in key else key}={value}"]

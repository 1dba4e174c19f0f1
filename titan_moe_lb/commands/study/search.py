"""Choice of the cells that a study runs: all combinations, or trials of an Optuna sampler."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from titan_moe_lb.commands.study.cell import Cell, CellFolder, Record
from titan_moe_lb.commands.study.design import Study, label
from titan_moe_lb.commands.study.measure import measure
from titan_moe_lb.errors import JobError


class Grid:
    """Choice of all combinations."""

    def __init__(self, study: Study) -> None:
        self.known_cells = study.grid()
        """Cells that are known before the first one has run."""
        self.total = len(self.known_cells)

    def cells(self) -> Iterator[Cell]:
        """Iterate over the cells to run."""
        return iter(self.known_cells)

    def tell(self, folder: CellFolder, record: Record) -> None:
        """Ignore the result, on which no later cell depends."""


class Search:
    """Choice of cells that lower loss and MaxVio together, by a sampler of Optuna.

    The folders of the cells are the only record of a search. A restart reports their results to
    the sampler in the order in which it chooses the cells.
    """

    known_cells: tuple[Cell, ...] = ()

    def __init__(self, study: Study) -> None:
        """Create the sampler.

        Raises:
            JobError: Optuna is not installed.
        """
        try:
            import optuna
        except ImportError:
            raise JobError(
                f'sampler = "{study.settings.sampler}" needs Optuna: pip install '
                '"titan-moe-lb[study]"; sampler = "grid" does not'
            ) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        samplers = {
            "random": optuna.samplers.RandomSampler,
            "tpe": optuna.samplers.TPESampler,
            "nsga2": optuna.samplers.NSGAIISampler,
        }
        self._optuna = optuna
        self._study = study
        self.total = study.settings.trials
        self._trials: dict[str, Any] = {}
        self._search = optuna.create_study(
            directions=["minimize", "minimize"],
            sampler=samplers[study.settings.sampler](seed=0),
        )

    def cells(self) -> Iterator[Cell]:
        """Choose one cell for each trial, and skip combinations that were chosen before."""
        for _number in range(self._study.settings.trials):
            trial = self._search.ask()
            chosen: dict[str, tuple[str, dict[str, Any]]] = {}
            for axis in self._study.axes:
                if axis.is_range:
                    assert axis.low is not None and axis.high is not None
                    value = trial.suggest_float(axis.title, axis.low, axis.high, log=axis.log)
                    value = float(f"{value:.4g}")
                    chosen[axis.title] = label(value), {axis.key: value}
                else:
                    choices = axis.choices()
                    name = trial.suggest_categorical(axis.title, list(choices))
                    chosen[axis.title] = name, choices[name]
            cell = self._study.cell(chosen)
            if cell.name in self._trials:
                self._search.tell(trial, state=self._optuna.trial.TrialState.PRUNED)
                continue
            self._trials[cell.name] = trial
            yield cell

    def tell(self, folder: CellFolder, record: Record) -> None:
        """Report the loss and MaxVio of a cell to the sampler."""
        trial = self._trials[folder.cell.name]
        values = []
        if record.status == "done":
            found, _course = measure(folder.path, self._study.settings.balanced_below)
            held_out = not math.isnan(found["validation_loss"])
            loss = found["validation_loss" if held_out else "training_loss"]
            values = [loss, found["max_violation"]]
        if values and not any(map(math.isnan, values)):
            self._search.tell(trial, values)
        else:
            self._search.tell(trial, state=self._optuna.trial.TrialState.FAIL)

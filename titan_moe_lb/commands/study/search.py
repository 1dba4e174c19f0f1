"""Which cells a study runs: every combination, or those that a sampler of Optuna asks for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from titan_moe_lb.commands.study.cell import Cell
from titan_moe_lb.commands.study.design import Study, label
from titan_moe_lb.errors import JobError


class Search:
    """Cells that lower two numbers together.

    What has been run is told to the sampler when it starts again, in the order of its asking: the
    folders of the cells are the only record, so that nothing can disagree with them.
    """

    def __init__(self, study: Study) -> None:
        """Raises JobError: Optuna is not installed."""
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
        self._trials: dict[str, Any] = {}
        self._search = optuna.create_study(
            directions=["minimize", "minimize"],
            sampler=samplers[study.settings.sampler](seed=0),
        )

    def cells(self) -> Iterator[Cell]:
        """One for each trial; a combination that was asked for before is not run again."""
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

    def tell(self, cell: Cell, loss: float, violation: float) -> None:
        """What a cell came to; NaN where it failed."""
        trial = self._trials[cell.name]
        if math.isnan(loss + violation):
            self._search.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        else:
            self._search.tell(trial, [loss, violation])

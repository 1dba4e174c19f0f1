"""Callback of transformers' ``Trainer``, and so of TRL's, that records the expert load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from titan_moe_lb.own_loop.observe import Observation, observe


class ExpertLoadCallback(TrainerCallback):
    """Observe the model of a Trainer: ``Trainer(..., callbacks=[ExpertLoadCallback("runs/mine")])``.

    Each optimizer step is written to the trace in ``run_dir``.
    """

    def __init__(self, run_dir: Path | str, **options: Any) -> None:
        """Prepare the callback.

        Args:
            run_dir: folder of the trace.
            **options: further arguments of :func:`titan_moe_lb.observe`.
        """
        self._run_dir, self._options = run_dir, options
        self._observation: Observation | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the routers."""
        self._observation = observe(kwargs["model"], self._run_dir, **self._options)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the step."""
        assert self._observation is not None
        self._observation.step(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the trace."""
        assert self._observation is not None
        self._observation.close()

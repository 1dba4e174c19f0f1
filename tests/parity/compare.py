"""One layout against one process."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tests.parity.gradients import layout_gradients, save_seed
from tests.parity.layout import Layout
from tests.rank_pool import RankPool


@dataclass
class Comparison:
    layout: Layout
    max_relative_error: float
    worst_parameter: str
    num_parameters: int
    recorded: dict[str, Any]


@dataclass
class Parity:
    """Compare layouts of one model and its losses with a single-process run.

    The reference is computed once and kept. Use as a context manager.
    """

    pool: RankPool
    model: dict[str, Any]
    module: str = "deepseek_v3"
    config: str = "deepseek_v3_tiny"
    with_main_loss: bool = False
    _folder: TemporaryDirectory = field(default_factory=TemporaryDirectory)
    _reference: dict[str, torch.Tensor] | None = None
    recorded: dict[str, Any] = field(default_factory=dict)

    def __enter__(self) -> Parity:
        return self

    def __exit__(self, *exception: object) -> None:
        self._folder.cleanup()

    @property
    def reference(self) -> dict[str, torch.Tensor]:
        """Gradients of the single process, by parameter name."""
        if self._reference is None:
            self.pool.run(1, save_seed, self._seed, self.module, self.config, self.model)
            self._reference, self.recorded = self.gradients(Layout())
        return self._reference

    def compare(self, layout: Layout) -> Comparison:
        """Largest error over the parameters, relative to the largest entry of each reference."""
        reference = self.reference
        gradients, recorded = self.gradients(layout)
        assert gradients.keys() == reference.keys(), gradients.keys() ^ reference.keys()
        errors = {
            name: ((gradients[name] - expected).abs().max() / expected.abs().max()).item()
            for name, expected in reference.items()
            if expected.abs().max() > 0
        }
        spurious = [
            name
            for name, expected in reference.items()
            if expected.abs().max() == 0 and gradients[name].abs().max() > 0
        ]
        assert not spurious, f"gradient where the reference has none: {spurious}"
        worst = max(errors, key=lambda name: errors[name])
        return Comparison(layout, errors[worst], worst, len(errors), recorded)

    def gradients(self, layout: Layout) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        with TemporaryDirectory(dir=self._folder.name) as out:
            recorded = self.pool.run(
                layout.num_ranks,
                layout_gradients,
                self._seed,
                out,
                layout,
                module=self.module,
                config=self.config,
                model=self.model,
                with_main_loss=self.with_main_loss,
            )
            gradients: dict[str, torch.Tensor] = {}
            for rank in range(layout.num_ranks):
                gradients.update(torch.load(os.path.join(out, f"rank{rank}.pt")))
        return gradients, recorded[0]

    @property
    def _seed(self) -> str:
        return os.path.join(self._folder.name, "seed")

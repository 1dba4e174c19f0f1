"""One layout against one process."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from tests.parity.gradients import (
    GLOBAL_BATCH_SIZE,
    Padding,
    Recorded,
    layout_gradients,
    save_seed,
)
from tests.parity.layout import Layout
from tests.support.rank_pool import RankPool

Gradients = dict[str, torch.Tensor]


@dataclass
class Comparison:
    layout: Layout
    loss: str
    max_relative_error: float
    worst_parameter: str
    num_parameters: int
    recorded: Recorded
    expected: Recorded
    """What the reference logs."""

    def line(self) -> str:
        """JSON, without the tables that are compared bit by bit."""
        answer = dataclasses.asdict(self)
        del answer["expected"]
        for table in ("bias", "valid_counts", "histograms"):
            del answer["recorded"][table]
        return json.dumps(answer)


@dataclass
class Parity:
    """Compare layouts of one model and its losses with a single-process run.

    The reference is computed once for each length of the sequences and kept. Use as a context
    manager.
    """

    pool: RankPool
    model: dict[str, Any]
    module: str = "deepseek_v3"
    config: str = "deepseek_v3_tiny"
    with_main_loss: bool = False
    alone: tuple[str, ...] = ("",)
    """Losses to compare one at a time; the empty string: all together."""
    padded: bool = False
    """The batch has padding. The reference is the same batch without it, row by row."""
    router_gradients: bool = False
    """Measure the gradients of either loss in the logits, and compare them too."""

    _folder: TemporaryDirectory = field(default_factory=TemporaryDirectory)
    _references: dict[int, dict[str, tuple[Gradients, Recorded]]] = field(default_factory=dict)

    def __enter__(self) -> Parity:
        return self

    def __exit__(self, *exception: object) -> None:
        self._folder.cleanup()

    @property
    def seed_folder(self) -> str:
        return os.path.join(self._folder.name, "seed")

    def reference(self, layout: Layout) -> dict[str, tuple[Gradients, Recorded]]:
        """Gradients and log of the single process on the layout's batch, by loss."""
        length = layout.sequence_length
        if length not in self._references:
            if self.padded:
                row_by_row = Layout(accumulate=GLOBAL_BATCH_SIZE, length=length)
                self._references[length] = self.gradients(row_by_row, self.alone, "cut")
            else:
                self._references[length] = self.gradients(Layout(length=length), self.alone)
        return self._references[length]

    def compare(self, layout: Layout, alone: tuple[str, ...] | None = None) -> list[Comparison]:
        """One comparison for each entry of ``alone``; by default that of the reference."""
        self.pool.need(layout.num_ranks)
        reference = self.reference(layout)
        gradients = self.gradients(layout, alone or self.alone, "masked" if self.padded else "none")
        return [
            relative_error(layout, loss, (found, recorded), reference[loss])
            for loss, (found, recorded) in gradients.items()
        ]

    def gradients(
        self, layout: Layout, alone: tuple[str, ...] | None = None, padding: Padding = "none"
    ) -> dict[str, tuple[Gradients, Recorded]]:
        alone = alone or self.alone
        if not os.path.exists(self.seed_folder):
            self.pool.run(1, save_seed, self.seed_folder, self.module, self.config, self.model)
        with TemporaryDirectory(dir=self._folder.name) as out:
            by_rank = self.pool.run(
                layout.num_ranks,
                layout_gradients,
                self.seed_folder,
                out,
                layout,
                module=self.module,
                config=self.config,
                model=self.model,
                with_main_loss=self.with_main_loss,
                alone=alone,
                padding=padding,
                router_gradients=self.router_gradients,
            )
            assert all(recorded == by_rank[0] for recorded in by_rank), "ranks log different values"
            for passes in zip(*by_rank, strict=True):
                for other in passes[1:]:
                    passes[0].bias |= other.bias
                    passes[0].valid_counts |= other.valid_counts
                    passes[0].histograms |= other.histograms
            return {
                loss: (_merge(out, loss, layout.num_ranks), recorded)
                for loss, recorded in zip(alone, by_rank[0], strict=True)
            }


def relative_error(
    layout: Layout,
    loss: str,
    found: tuple[Gradients, Recorded],
    reference: tuple[Gradients, Recorded],
) -> Comparison:
    """Largest error over the parameters, relative to the largest entry of each reference."""
    gradients, recorded = found
    expected_gradients, expected_log = reference
    missing = gradients.keys() ^ expected_gradients.keys()
    assert not missing, f"only one side has a gradient of {sorted(missing)}"
    errors = {}
    for name, expected in expected_gradients.items():
        size = expected.abs().max()
        error = (gradients[name] - expected).abs().max()
        assert size > 0 or error == 0, f"{name} has a gradient where the reference has none"
        if size > 0:
            errors[name] = (error / size).item()
    worst = max(errors, key=lambda name: errors[name])
    return Comparison(layout, loss, errors[worst], worst, len(errors), recorded, expected_log)


def assert_same_log(recorded: Recorded, expected: Recorded, relative: float = 1e-6) -> None:
    """Counts bitwise, once for each micro-batch whatever is recomputed; losses to rounding."""
    assert recorded.layers == expected.layers
    assert recorded.counts == expected.counts
    assert recorded.losses.keys() == expected.losses.keys()
    for name, values in expected.losses.items():
        assert np.allclose(recorded.losses[name], values, rtol=relative, atol=0), name


def _merge(folder: str, loss: str, num_ranks: int) -> Gradients:
    """The stages of all ranks."""
    gradients: Gradients = {}
    for rank in range(num_ranks):
        gradients.update(torch.load(os.path.join(folder, f"{loss}-rank{rank}.pt")))
    return gradients

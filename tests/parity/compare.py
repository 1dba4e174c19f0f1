"""Compare one layout with one process."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

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
TOLERANCE = 1e-5
DIFFERENCES = {"entropy_loss", "importance_loss", "my_importance_loss"}
"""Losses near 0 that are differences of numbers of size 1, and so round to 1e-7."""


@dataclass
class Comparison:
    """Gradients and log of a layout, with those of the reference."""

    layout: Layout
    loss: str
    max_relative_error: float
    worst_parameter: str
    num_parameters: int
    recorded: Recorded
    expected: Recorded
    padded: bool = False

    def line(self) -> str:
        """Format one line of JSON, without the tables that are compared bit by bit."""
        answer = dataclasses.asdict(self)
        del answer["expected"], answer["padded"]
        for table in ("bias", "valid_counts", "histograms"):
            del answer["recorded"][table]
        return json.dumps(answer)

    def faults(self, tolerance: float = TOLERANCE) -> list[str]:
        """List the differences of gradient, counts, losses and bias.

        Counts are equal whole numbers, and so is a bias that is a function of them. The reference
        of a padded batch has no padding, so valid counts are compared. A score may round across the
        edge of a bin: 1/1000 of a histogram may be in a neighbouring bin, and a quantile bias may
        differ by 1/1000 of a uniform bin.
        """
        recorded, expected = self.recorded, self.expected
        found = []
        if not self.max_relative_error <= tolerance:
            found.append(f"gradient of {self.worst_parameter}")
        if recorded.layers != expected.layers:
            found.append("layers")
        if recorded.counts != expected.counts and not self.padded:
            found.append("counts")
        for layer, counts in expected.valid_counts.items():
            if not torch.equal(recorded.valid_counts[layer], counts):
                found.append(f"valid counts of layer {layer}")
        for name, value in expected.losses.items():
            rtol = tolerance if name.endswith("gradient_squared") else 1e-6
            atol = 1e-7 if name in DIFFERENCES else 0.0
            pair = torch.tensor(recorded.losses[name]), torch.tensor(value)
            if not torch.allclose(*pair, rtol=rtol, atol=atol):
                found.append(name)
        if recorded.bias.keys() != expected.bias.keys():
            return [*found, "layers with a bias"]
        for layer, bias in expected.bias.items():
            if not expected.histograms:
                same = torch.equal(recorded.bias[layer], bias)
            else:
                histogram = expected.histograms[layer]
                moved = (recorded.histograms[layer] - histogram).abs().sum() / 2
                if moved > 1e-3 * histogram.sum():
                    found.append(f"histograms of layer {layer}")
                width = (bias.max() - bias.min() + 2) / histogram.shape[-1]
                same = (recorded.bias[layer] - bias).abs().max() <= width / 1000
            if not same:
                found.append(f"bias of layer {layer}")
        return found


@dataclass
class Parity:
    """Compare layouts of one model and its losses with a single-process run.

    The reference is computed once for each length of the sequences. Use as a context manager.
    """

    pool: RankPool
    model: dict[str, Any]
    module: str = "deepseek_v3"
    config: str = "deepseek_v3_tiny"
    with_main_loss: bool = False
    alone: tuple[str, ...] = ("",)
    """Losses to compare one at a time; the empty string stands for all together."""
    padded: bool = False
    """True if the batch has padding. The reference is the batch without it, row by row."""
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
        """Compute gradients and log of the single process on the layout's batch, by loss."""
        length = layout.sequence_length
        if length not in self._references:
            if self.padded:
                row_by_row = Layout(accumulate=GLOBAL_BATCH_SIZE, length=length)
                self._references[length] = self.gradients(row_by_row, padding="cut")
            else:
                self._references[length] = self.gradients(Layout(length=length))
        return self._references[length]

    def compare(self, layout: Layout, alone: tuple[str, ...] | None = None) -> list[Comparison]:
        """Compare once for each entry of ``alone``; by default, as the reference."""
        self.pool.need(layout.num_ranks)
        reference = self.reference(layout)
        gradients = self.gradients(layout, alone, "masked" if self.padded else "none")
        return [
            relative_error(layout, loss, found, reference[loss], padded=self.padded)
            for loss, found in gradients.items()
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
    *,
    padded: bool = False,
) -> Comparison:
    """Largest error over the parameters, relative to the largest entry of each reference."""
    gradients, recorded = found
    expected_gradients, expected = reference
    missing = gradients.keys() ^ expected_gradients.keys()
    assert not missing, f"only one side has a gradient of {sorted(missing)}"
    errors = {}
    for name, gradient in expected_gradients.items():
        size = gradient.abs().max()
        error = (gradients[name] - gradient).abs().max()
        assert size > 0 or error == 0, f"{name} has a gradient where the reference has none"
        if size > 0:
            errors[name] = (error / size).item()
    worst = max(errors, key=lambda name: errors[name])
    return Comparison(
        layout, loss, errors[worst], worst, len(errors), recorded, expected, padded=padded
    )


def _merge(folder: str, loss: str, num_ranks: int) -> Gradients:
    """Merge the stages of all ranks."""
    gradients: Gradients = {}
    for rank in range(num_ranks):
        gradients.update(torch.load(os.path.join(folder, f"{loss}-rank{rank}.pt")))
    return gradients

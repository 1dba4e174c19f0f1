"""What balances the experts in a comparison: losses, the rule of the bias, and the padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tests.parity.compare import Comparison

TOLERANCE = 1e-5
NUM_BINS = 1000
WEIGHT = 0.1
LOSSES: dict[str, dict[str, Any]] = {
    "sequence_wise": {},
    "global_batch": {},
    "device_level": {"num_device_groups": 4},
    "communication": {"num_device_groups": 4, "devices_per_token": 2},
    "importance": {},
    "entropy": {},
    "z_loss": {},
}
"""Those that no cut of the batch changes."""
RULES: dict[str, Any] = {
    "none": "none",
    "sign": {"type": "sign", "speed": 0.01},
    "proportional": {"type": "proportional", "speed": 0.01},
    "momentum": {"type": "momentum"},
    "quantile": {"type": "quantile", "num_bins": NUM_BINS},
}


@dataclass(frozen=True)
class Balance:
    """Of one model."""

    losses: tuple[str, ...] = ("sequence_wise",)
    bias: str = ""
    """Of ``RULES``; empty: that of the model."""
    padded: bool = False

    def model(self, weight: float = WEIGHT) -> dict[str, Any]:
        """The table ``[model]`` of it."""
        losses = [
            # A hundredth of it has a gradient of about the size of the others.
            {"type": kind, "weight": weight / 100 if kind == "z_loss" else weight}
            | LOSSES.get(kind, {})
            for kind in self.losses
        ]
        return {"aux_losses": losses, **({"expert_bias": RULES[self.bias]} if self.bias else {})}

    def flags(self) -> str:
        """Of ``python -m tests.parity``."""
        bias = f" --bias {self.bias}" if self.bias else ""
        return f"--loss {','.join(self.losses)}{bias}{' --padded' * self.padded}"


def faults(
    comparison: Comparison, *, padded: bool = False, tolerance: float = TOLERANCE
) -> list[str]:
    """What two layouts must not differ in: gradient, counts, losses and bias.

    The reference of a padded batch has no padding to count: counts that teach are compared then.

    Counts are whole numbers and equal, and so is a bias that is a function of them. Of a bias
    made of quantiles scores count, which may round across the edge of a bin of its histogram:
    it is equal to 1/1000 of a bin.
    """
    recorded, expected = comparison.recorded, comparison.expected
    found = []
    if not comparison.max_relative_error <= tolerance:
        found.append(f"gradient of {comparison.worst_parameter}")
    if recorded.layers != expected.layers:
        found.append("layers")
    if recorded.counts != expected.counts and not padded:
        found.append("counts")
    for layer, counts in expected.valid_counts.items():
        if not torch.equal(recorded.valid_counts[layer], counts):
            found.append(f"valid counts of layer {layer}")
    for name, values in expected.losses.items():
        # The entropy is a difference from log E.
        if not torch.allclose(
            torch.tensor(recorded.losses[name]), torch.tensor(values), rtol=1e-6, atol=1e-7
        ):
            found.append(name)
    if recorded.bias.keys() != expected.bias.keys():
        found.append("layers with a bias")
        return found
    for layer, bias in expected.bias.items():
        if expected.histograms:
            width = (bias.max() - bias.min() + 2) / NUM_BINS
            same = (recorded.bias[layer] - bias).abs().max() <= width / 1000
        else:
            same = torch.equal(recorded.bias[layer], bias)
        if not same:
            found.append(f"bias of layer {layer}")
    return found

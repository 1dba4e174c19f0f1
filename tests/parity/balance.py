"""Balancing of a comparison: losses, bias rule and padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
"""Losses that no cut of the batch changes, and their options."""
RULES: dict[str, Any] = {
    "none": "none",
    "sign": {"type": "sign", "speed": 0.01},
    "proportional": {"type": "proportional", "speed": 0.01},
    "momentum": {"type": "momentum"},
    "quantile": {"type": "quantile", "num_bins": NUM_BINS},
    "quantile_trend": {"type": "quantile_trend", "num_bins": NUM_BINS},
}


@dataclass(frozen=True)
class Balance:
    """Balancing of one model."""

    losses: tuple[str, ...] = ("sequence_wise",)
    bias: str = ""
    """A key of ``RULES``; empty: the rule of the model."""
    padded: bool = False
    score_func: str = ""
    """Score function; empty: that of the model."""

    def model(self, weight: float = WEIGHT) -> dict[str, Any]:
        """Make the ``[model]`` table of a job."""
        losses = [
            # A hundredth of it has a gradient of about the size of the others.
            {"type": kind, "weight": weight / 100 if kind == "z_loss" else weight}
            | LOSSES.get(kind, {})
            for kind in self.losses
        ]
        model: dict[str, Any] = {"aux_losses": losses}
        if self.bias:
            model["expert_bias"] = RULES[self.bias]
        if self.score_func:
            model["score_func"] = self.score_func
        return model

    def flags(self) -> str:
        """Flags of ``python -m tests.parity``."""
        bias = f" --bias {self.bias}" if self.bias else ""
        scores = f" --score-func {self.score_func}" if self.score_func else ""
        return f"--loss {','.join(self.losses)}{bias}{scores}{' --padded' * self.padded}"

"""Losses and bias rule of a run, and the changes that a finding proposes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from titan_moe_lb.commands.diagnose.window import Window, mean_over_steps

QUANTILE = 'expert_bias = {type = "quantile"}'

OTHER_LOSSES = {
    "z_loss": "keeps logits small",
    "entropy_loss": "evens out probabilities",
    "importance_loss": "evens out probabilities",
    "device_level_loss": "evens out groups of experts",
    "communication_loss": "evens out groups of experts",
}
"""Metric name to effect of each loss of this package that does not balance single experts.

A user's own loss counts as balancing.
"""


class Remedy(TypedDict):
    """Fields of a :class:`Finding` that propose a change."""

    remedy: str
    toml: str


@dataclass(frozen=True)
class Balancing:
    """Losses and bias rule of the run of a window."""

    window: Window

    @property
    def losses(self) -> dict[str, float]:
        """Losses that balance experts: metric name to weight."""
        losses = self.window.trace.info.losses
        return {name: weight for name, weight in losses.items() if name not in OTHER_LOSSES}

    @property
    def description(self) -> str:
        """Bias rule and settings; "" without a bias. If layers differ, the first moving rule."""
        rules = (self.window.trace.info.expert_bias or "").split("; ")
        return next((rule for rule in rules if rule.partition(" ")[0] != "frozen"), rules[0])

    @property
    def rule(self) -> str:
        """``type_name`` of the bias rule; "" without a bias."""
        return self.description.partition(" ")[0]

    @property
    def bias_moves(self) -> bool:
        """True if the bias moves. Its recorded steps decide, since a speed may change to 0."""
        steps_SM = self.window.column("bias_largest_step")
        return self.rule not in ("", "frozen") and (steps_SM is None or bool(steps_SM.any()))

    def setting(self, name: str) -> float | None:
        """Read a setting from the description, as in ``quantile (num_bins 1000, ema 0.9)``."""
        found = re.search(rf"[( ]{name} (\d+(?:\.\d+)?(?:e[+-]?\d+)?)", self.description)
        return float(found[1]) if found else None

    @property
    def margin_M(self) -> np.ndarray:
        """Mean selection score of the last chosen expert less that of the next one ``(M,)``.

        Measured with ``metrics.router_scores``. Without it, scores are taken as uniform from 0 to
        twice that of a logit of 0, whose mean distance is the margin.
        """
        info = self.window.trace.info
        typical_M = np.full(len(info.layers), 0.5)
        if info.score_func == "softmax":
            typical_M = 1 / info.num_experts_M
        elif info.score_func == "sqrtsoftplus":
            typical_M[:] = math.sqrt(math.log(2))
        margin_M = 2 * typical_M / info.num_experts_M
        measured_SM = self.window.column("selection_margin")
        if measured_SM is None:
            return margin_M
        measured_M = mean_over_steps(measured_SM)
        return np.where(measured_M > 0, measured_M, margin_M)

    def moved(self, bias_M: np.ndarray) -> np.ndarray:
        """Estimate the share of its balanced load by which a change of bias moves an expert.

        Small margins are taken as uniform, with the density 1 / margin. Then a share ``bias / margin``
        of all tokens changes a choice, ``bias / (margin E)`` to each expert. The balanced load is
        K/E of them.

        Args:
            bias_M: change of the bias in each layer ``(M,)``.
        """
        return bias_M / (self.margin_M * self.window.trace.info.top_k_M)

    def harder(self, first: str = "") -> Remedy:
        """Propose a remedy for uneven loads, given the losses and the bias rule of the run.

        Args:
            first: text before the remedy.
        """
        remedy, toml = "add a bias that moves", QUANTILE
        if self.window.trace.info.is_foreign:
            remedy, toml = "a larger weight of its loss, or speed of its bias", ""
        elif self.bias_moves and self.setting("speed"):
            remedy = "ten times the speed of the bias, or a rule without one"
        elif self.bias_moves and self.setting("ema"):
            remedy = "let the bias follow every step"
            toml = f'expert_bias = {{type = "{self.rule}", ema = 0.0}}'
        elif self.losses:
            name, weight = max(self.losses.items(), key=lambda item: item[1])
            remedy = f"ten times the weight of {name}"
            toml = f"weight = {10 * weight:g}   # of {name}"
            if not self.bias_moves:
                remedy, toml = f"{remedy}, or a bias", f"{toml}; or: {QUANTILE}"
        elif self.bias_moves:
            remedy = "a loss that balances, beside the bias"
            toml = 'aux_losses = [{type = "global_batch", weight = 1e-3}]'
        return {"remedy": first + remedy, "toml": toml}

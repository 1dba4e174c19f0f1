"""Losses and bias rule of a run, and the change of them that a finding proposes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from titan_moe_lb.commands.diagnose.window import Window

QUANTILE = 'expert_bias = {type = "quantile"}'

OTHER_LOSSES = {
    "z_loss": "keeps logits small",
    "entropy_loss": "evens out probabilities",
    "importance_loss": "evens out probabilities",
    "device_level_loss": "evens out groups of experts",
    "communication_loss": "evens out groups of experts",
}
"""Losses of this package that do not balance single experts, by metric name, and their effect. A
loss of one's own counts as one that balances."""


class Remedy(TypedDict):
    """Fields of a finding."""

    remedy: str
    toml: str


@dataclass(frozen=True)
class Balancing:
    """Losses and bias rule of the run whose end is looked at."""

    window: Window

    @property
    def losses(self) -> dict[str, float]:
        """Losses that balance experts: metric name to weight."""
        losses = self.window.trace.info.losses
        return {name: weight for name, weight in losses.items() if name not in OTHER_LOSSES}

    @property
    def description(self) -> str:
        """The rule and its settings; "" without a bias. Of several, by layer, the first that moves."""
        rules = (self.window.trace.info.expert_bias or "").split("; ")
        return next((rule for rule in rules if rule.partition(" ")[0] != "frozen"), rules[0])

    @property
    def rule(self) -> str:
        """``type_name`` of the rule; "" without a bias."""
        return self.description.partition(" ")[0]

    @property
    def bias_moves(self) -> bool:
        """A speed may have been changed to 0: the steps themselves decide, where they are known."""
        steps_SM = self.window.column("bias_largest_step")
        return self.rule not in ("", "frozen") and (steps_SM is None or bool(steps_SM.any()))

    def setting(self, name: str) -> float | None:
        """A setting of the rule, from its description: ``quantile (num_bins 1000, ema 0.9)``."""
        found = re.search(rf"[( ]{name} (\d+(?:\.\d+)?(?:e[+-]?\d+)?)", self.description)
        return float(found[1]) if found else None

    @property
    def typical_score_M(self) -> np.ndarray:
        """1/E under a softmax, 1/2 under a sigmoid and in an older trace without a score function."""
        info = self.window.trace.info
        softmax = info.score_func == "softmax"
        return 1 / info.num_experts_M if softmax else np.full(len(info.layers), 0.5)

    def moved(self, bias_M: np.ndarray) -> np.ndarray:
        """Part of its balanced load that an expert gets or loses by such a change of its bias.

        For scores that are spread evenly from 0 to twice the typical one: then
        ``bias / (2 typical)`` of all tokens choose otherwise, and an expert has K/E of them.
        """
        info = self.window.trace.info
        return bias_M / (2 * self.typical_score_M) * info.num_experts_M / info.top_k_M

    def harder(self, first: str = "") -> Remedy:
        """Remedy against uneven loads with the losses and the bias rule of the job.

        Args:
            first: text before the remedy.
        """
        remedy, toml = "add a bias that moves", QUANTILE
        if self.bias_moves and self.setting("speed"):
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

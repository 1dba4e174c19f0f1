"""What every rule of the expert bias shares."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from titan_moe_lb.component import Component, require_formula
from titan_moe_lb.value_schedule import Change


class ExpertBias(Component):
    """Moves the bias ``b_i`` that is added to the scores of an expert for the choice alone.

    The bias is torchtitan's buffer ``expert_bias_E`` of each MoE layer, float32 and part
    of the checkpoint; a rule says how it moves when the optimizer steps. Every layer has
    a component of its own, and the first of a rank moves the biases of all its layers at
    once, stacked. A rule of one's own is a subclass with a ``type_name``.
    """

    kinds: ClassVar[dict[str, type[ExpertBias]]] = {}
    """Every rule that can be configured, by ``type_name``."""

    moves: ClassVar[bool] = True
    """Whether the rule ever changes the bias, so that it needs the counts of every step."""

    @dataclass(kw_only=True, slots=True)
    class Config(Component.Config):
        reset: bool = False
        """Start from a bias of zero where the job begins from a checkpoint with a learned
        one. Once: a restart of the same job goes on with what it has learned since."""

        changes: list[Change] = field(default_factory=list)
        """When the value that the rule is tuned by changes, and to what."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        if self.moves:
            require_formula("expert bias", type(self), ExpertBias, "delta")
        self.config = config

    def set_progress(self, step: int, tokens: int) -> None:
        """Take the values of the schedule. On the host, before the bias is moved.

        Args:
            step: the optimizer step that is about to end, from 1.
            tokens: tokens of the global batches of the steps before it.
        """

    def delta(self, bias_NE: torch.Tensor, counts_NE: torch.Tensor) -> torch.Tensor:
        """What to add to the biases of N layers after a step.

        Args:
            bias_NE: float32 ``(N, E)``.
            counts_NE: tokens that selected each expert in the whole step, over all ranks,
                int64 ``(N, E)``.

        Returns:
            float32 ``(N, E)``.
        """
        raise NotImplementedError

"""Metrics of the capacity factors that a step needs."""

from __future__ import annotations

import numpy as np

from titan_moe_lb.telemetry.metrics.base import Metric, Reduction
from titan_moe_lb.telemetry.rank_step import RankStep
from titan_moe_lb.traces.capacity import capacity_factor, overrun_factor


class CapacityFactor(Metric):
    """Capacity factor that drops at most 1 % of the tokens of a step."""

    name = "capacity_factor_1pct"
    title = "capacity factor, 1 % dropped"
    description = (
        "Room of an expert-parallel rank, over the balanced tokens, with which no "
        "expert-parallel group would drop more than 1 % of the tokens of the step"
    )
    over_ranks = Reduction.MAX
    over_layers = Reduction.MAX

    def measure(self, step: RankStep) -> np.ndarray:
        """Compute the factor over all micro-batches of the step."""
        return capacity_factor(step.received_NMR, 0.01)


class ActivationSlotFactor(Metric):
    """Overload factor of the tokens that the layers of a stage keep of one micro-batch."""

    name = "activation_slot_factor"
    description = (
        "Tokens of a micro-batch on the most loaded rank in all layers of its pipeline stage, over "
        "the balanced number: DistMoE's activation_slot_capacity_factor that keeps all of them"
    )
    over_ranks = Reduction.MAX
    over_layers = Reduction.MAX
    of_step = True

    def measure(self, step: RankStep) -> np.ndarray:
        """Compute the factor of the worst micro-batch, and repeat it for each layer."""
        factor = overrun_factor(step.received_NMR, stages=step.stages)
        return np.full(len(step.stages), factor)

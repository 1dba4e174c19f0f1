"""Metrics of the routers: each says what it measures on a rank, and how ranks are put together.

A metric of one's own is a subclass with a ``name``: it is measured on every logged step,
reduced, written to the trace and shown, without an edit elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import ClassVar

import numpy as np

from titan_moe_lb.balancing.component import enter
from titan_moe_lb.balancing.router import LoadBalancedRouter
from titan_moe_lb.telemetry import overload
from titan_moe_lb.telemetry.rank_step import RankStep
from titan_moe_lb.traces.balance_statistics import max_violation
from titan_moe_lb.traces.capacity import capacity_factor
from titan_moe_lb.traces.column import Column


class Reduction(Enum):
    """How the numbers of the ranks become one, over all that route a stage's tokens."""

    SUM = "sum"
    """The ranks hold parts: their sum is the whole."""
    MEAN = "mean"
    """Every rank's number counts alike."""
    MAX = "max"
    """The largest decides: the rank that the others wait for."""


class Metric:
    """One number of each MoE layer and logged step."""

    name: ClassVar[str]
    """Of the trace's column, and of the sinks' key behind ``moe/``."""

    description: ClassVar[str]
    """One sentence, for the report."""

    over_ranks: ClassVar[Reduction]

    over_layers: ClassVar[Reduction] = Reduction.MEAN
    """How the layers become the one number of the step."""

    of_step: ClassVar[bool] = False
    """The number is the step's own, not a layer's: all rows of the trace repeat it."""

    kinds: ClassVar[dict[str, type[Metric]]] = {}
    """Every metric, by name."""

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            enter(Metric.kinds, "name", cls)

    @classmethod
    def figure(cls) -> Column:
        """What the trace says of it."""
        return Column(
            cls.name,
            per="step" if cls.of_step else "layer",
            summary=cls.over_layers.value,
            description=cls.description,
        )

    @classmethod
    def applies_to(cls, router: LoadBalancedRouter.Config) -> bool:
        """Whether there is something to measure in such a router; one of the model is enough."""
        return True

    def measure(self, step: RankStep) -> np.ndarray | None:
        """This rank's numbers.

        Returns:
            float64 ``(N,)``, one for each router of the rank, NaN for one that has nothing to
            measure; None where none has, on all ranks of the stage alike.
        """
        raise NotImplementedError


class AverageOverload(Metric):
    name = "avg_overload_factor"
    description = (
        "Tokens on the most loaded expert-parallel rank over the balanced number, mean over "
        "micro-batches"
    )
    over_ranks = Reduction.MEAN

    def measure(self, step: RankStep) -> np.ndarray:
        return step.overload_NM.mean(axis=1)


class MaximumOverload(Metric):
    name = "max_overload_factor"
    description = "The same, of the worst micro-batch"
    over_ranks = Reduction.MAX
    over_layers = Reduction.MAX

    def measure(self, step: RankStep) -> np.ndarray:
        return step.overload_NM.max(axis=1)


class CumulativeOverload(Metric):
    name = "max_cum_overload_factor"
    description = (
        "Peak of the tokens that the worst rank keeps until backward, over the peak of a "
        "balanced rank"
    )
    over_ranks = Reduction.MAX
    over_layers = Reduction.MAX
    of_step = True

    def measure(self, step: RankStep) -> np.ndarray:
        factor = overload.cumulative_overload_factor(
            step.actions,
            step.stages,
            step.received_NMR[..., step.ep_rank],
            step.received_NMR.mean(axis=-1),
        )
        return np.full(len(step.stages), factor)


class CapacityFactor(Metric):
    name = "capacity_factor_1pct"
    description = (
        "Room of an expert-parallel rank, over the balanced tokens, with which no "
        "expert-parallel group would drop more than 1 % of the tokens of the step"
    )
    over_ranks = Reduction.MAX
    over_layers = Reduction.MAX

    def measure(self, step: RankStep) -> np.ndarray:
        return capacity_factor(step.received_NMR, 0.01)


class MicroBatchMaxViolation(Metric):
    name = "micro_batch_max_violation"
    description = "MaxVio of a micro-batch by itself, mean over micro-batches"
    over_ranks = Reduction.MEAN

    def measure(self, step: RankStep) -> np.ndarray:
        return max_violation(step.counts_NME).mean(axis=1)


class PaddingShare(Metric):
    name = "padding_share"
    description = "Share of the routed tokens that are padding: dispatched, and not learned from"
    over_ranks = Reduction.MAX
    of_step = True

    @classmethod
    def applies_to(cls, router: LoadBalancedRouter.Config) -> bool:
        return router.loop.padded

    def measure(self, step: RankStep) -> np.ndarray | None:
        if step.valid_counts_NE is None:
            return None
        valid_N, routed_N = (
            table_NE.clip(min=0).sum(axis=1)
            for table_NE in (step.valid_counts_NE, step.global_counts_NE)
        )
        return (routed_N - valid_N) / np.maximum(routed_N, 1)


def _of_known(
    table_NE: np.ndarray | None, function: Callable[[np.ndarray], float]
) -> np.ndarray | None:
    """A number of each row without what is NaN; NaN where nothing is left."""
    if table_NE is None:
        return None
    rows = [row_E[~np.isnan(row_E)] for row_E in table_NE]
    return np.array([function(row) if row.size else np.nan for row in rows])


class _OfBias(Metric):
    over_ranks = Reduction.MAX

    @classmethod
    def applies_to(cls, router: LoadBalancedRouter.Config) -> bool:
        return router.expert_bias is not None


class BiasRange(_OfBias):
    name = "bias_range"
    description = "Largest less smallest expert bias"

    def measure(self, step: RankStep) -> np.ndarray | None:
        return _of_known(step.bias_NE, np.ptp)


class BiasNorm(_OfBias):
    name = "bias_norm"
    description = "Euclidean norm of the expert biases"

    def measure(self, step: RankStep) -> np.ndarray | None:
        return _of_known(step.bias_NE, lambda bias_E: float(np.linalg.norm(bias_E)))


class BiasLargestStep(_OfBias):
    name = "bias_largest_step"
    description = "Largest change of an expert's bias in the step"
    over_layers = Reduction.MAX

    def measure(self, step: RankStep) -> np.ndarray | None:
        return _of_known(step.bias_delta_NE, lambda delta_E: np.abs(delta_E).max())


class _OfGradient(Metric):
    over_ranks = Reduction.SUM
    column: ClassVar[int]

    @classmethod
    def applies_to(cls, router: LoadBalancedRouter.Config) -> bool:
        return router.loop.gradients

    def measure(self, step: RankStep) -> np.ndarray | None:
        squares_N2 = step.gradient_squares_N2
        return None if squares_N2 is None else squares_N2[:, self.column].astype(np.float64)


class MainGradient(_OfGradient):
    name = "main_gradient_squared"
    description = "Squared norm of the gradient of the model's loss in the logits of the router"
    column = 0


class AuxGradient(_OfGradient):
    name = "aux_gradient_squared"
    description = "Squared norm of the gradient of the aux losses in the logits of the router"
    column = 1

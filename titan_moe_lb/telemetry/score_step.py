"""Sums of the scores in a finished step: the input of the metrics of scores.

Shape suffixes: N = routers of the rank, W, F, E = see
:mod:`titan_moe_lb.balancing.recording.score_sums`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from titan_moe_lb.balancing import choice
from titan_moe_lb.balancing.recording.score_sums import Column
from titan_moe_lb.balancing.recording.step_record import StepRecord
from titan_moe_lb.balancing.router import LoadBalancedRouter


@dataclass(frozen=True)
class ScoreStep:
    """Sums over the valid tokens of all ranks, as numpy arrays on the host."""

    columns_NWF: np.ndarray
    """Sums of the products of weight and column, float64."""
    probabilities_NE: np.ndarray
    """Sums of the probabilities of each expert, float64."""
    largest_logit_N: np.ndarray
    """Largest absolute logit of the tokens of this rank, float64."""
    num_experts_N: np.ndarray
    input_size_N: np.ndarray
    """Numbers in the input of each gate."""
    has_margin_N: np.ndarray
    """True for a router whose scores choose, and that has an expert left to choose, bool."""

    @cached_property
    def tokens_N(self) -> np.ndarray:
        """Valid tokens of each router, float64; NaN for a router without any."""
        tokens_N = self.columns_NWF[:, Column.TOKEN, Column.TOKEN]
        return np.where(tokens_N > 0, tokens_N, np.nan)

    def mean(self, column: int, weight: Column = Column.TOKEN) -> np.ndarray:
        """Compute the mean over the tokens of a column times a weight, float64 ``(N,)``."""
        return self.columns_NWF[:, weight, column] / self.tokens_N

    def mean_square(self, column: Column) -> np.ndarray:
        """Compute the mean square of a column that is a weight too, float64 ``(N,)``."""
        return self.mean(column, column)

    def of_margin(self, values_N: np.ndarray) -> np.ndarray:
        """Replace the values of routers without a margin by NaN."""
        return np.where(self.has_margin_N, values_N, np.nan)


def read(routers: list[LoadBalancedRouter], record: StepRecord) -> ScoreStep | None:
    """Read the reduced sums of the last finished step; None in a job that does not record them.

    Synchronises with the device.
    """
    if record.scores is None:
        return None
    assert record.sums is not None and record.sums.scores is not None
    columns_NWF, probabilities_NE = (table.cpu().numpy() for table in record.sums.scores)
    return ScoreStep(
        columns_NWF=columns_NWF,
        probabilities_NE=probabilities_NE,
        largest_logit_N=record.scores.largest_logit_N1[:, 0].cpu().numpy().astype(np.float64),
        num_experts_N=np.array([router.num_experts for router in routers]),
        input_size_N=np.array([router.gate.weight.shape[-1] for router in routers]),
        has_margin_N=np.array(
            [not choice.is_forced(r) and r.top_k < choice.open_experts(r) for r in routers]
        ),
    )

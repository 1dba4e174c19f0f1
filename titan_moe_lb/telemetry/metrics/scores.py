"""Metrics of a router's scores, logits and input. They leave out padding.

Every rank has the sums of all ranks, so that the maximum over the ranks is the value itself.
"""

from __future__ import annotations

import numpy as np

from titan_moe_lb.balancing.hash_router import is_hash_router
from titan_moe_lb.balancing.recording.score_sums import Column
from titan_moe_lb.balancing.router import LoadBalancedRouter
from titan_moe_lb.telemetry.metrics.base import Metric, Reduction
from titan_moe_lb.telemetry.rank_step import RankStep, ScoreStep


class OfScores(Metric):
    """Base class of the metrics of scores."""

    over_ranks = Reduction.MAX

    @classmethod
    def applies_to(cls, router: LoadBalancedRouter.Config) -> bool:
        """Return True for a router with scores, in a job that records them."""
        return router.loop.scores_every > 0 and not is_hash_router(router)

    def measure(self, step: RankStep) -> np.ndarray | None:
        """Compute the numbers from the sums of the step."""
        return None if step.scores is None else self.of_scores(step.scores, step)

    def of_scores(self, scores: ScoreStep, step: RankStep) -> np.ndarray:
        """Compute the numbers of each router, float64 ``(N,)``; NaN for a router without tokens."""
        raise NotImplementedError


class ChosenMass(OfScores):
    """Share of the scores of a token that its chosen experts have, mean over tokens."""

    name = "chosen_mass"
    title = "probability mass of the chosen"

    def of_scores(self, scores: ScoreStep, step: RankStep) -> np.ndarray:
        """Compute the mean mass."""
        return scores.mean(Column.CHOSEN, Column.INVERSE_SUM)


class TokenEntropy(OfScores):
    """Entropy of a token's normalized scores over its maximum ln E, mean over tokens."""

    name = "token_entropy"

    def of_scores(self, scores: ScoreStep, step: RankStep) -> np.ndarray:
        """Compute the mean entropy."""
        of_scores_N = scores.mean(Column.ENTROPY, Column.INVERSE_SUM)
        nats_N = of_scores_N - scores.mean(Column.LOG_INVERSE_SUM)
        return nats_N / np.log(scores.num_experts_N)


class GateLoadCorrelation(OfScores):
    """Correlation over the experts between probability mass and tokens of the step."""

    name = "gate_load_correlation"
    title = "gate mass against load"

    def of_scores(self, scores: ScoreStep, step: RankStep) -> np.ndarray:
        """Compute Pearson's correlation; NaN where either is equal for all experts."""
        counts_NE = step.global_counts_NE if step.valid_counts_NE is None else step.valid_counts_NE
        rows = zip(scores.probabilities_NE, counts_NE, scores.num_experts_N, strict=True)
        return np.array([_correlation(mass_E[:E], counts_E[:E]) for mass_E, counts_E, E in rows])


class LogitRms(OfScores):
    """Root mean square of the gate's logits."""

    name = "logit_rms"
    title = "RMS of the logits"

    def of_scores(self, scores: ScoreStep, step: RankStep) -> np.ndarray:
        """Compute the root of the mean square over tokens and experts."""
        return np.sqrt(scores.mean_square(Column.LOGIT_NORM) / scores.num_experts_N)


class LargestLogit(OfScores):
    """Largest absolute value of a logit in the step."""

    name = "largest_logit"
    over_layers = Reduction.MAX

    def of_scores(self, scores: ScoreStep, step: RankStep) -> np.ndarray:
        """Read the largest absolute logit of this rank."""
        return np.where(np.isnan(scores.tokens_N), np.nan, scores.largest_logit_N)


class GateInputRms(OfScores):
    """Root mean square of the hidden states that the gate reads."""

    name = "gate_input_rms"
    title = "RMS of the gate's input"

    def of_scores(self, scores: ScoreStep, step: RankStep) -> np.ndarray:
        """Compute the root of the mean square."""
        return np.sqrt(scores.mean_square(Column.INPUT_NORM) / scores.input_size_N)


def _correlation(left_E: np.ndarray, right_E: np.ndarray) -> float:
    left_E, right_E = left_E - left_E.mean(), right_E - right_E.mean()
    product = np.linalg.norm(left_E) * np.linalg.norm(right_E)
    return float(left_E @ right_E / product) if product > 0 else np.nan

"""Metrics of the margin between the last chosen and the first expert not chosen.

They are NaN where scores do not choose, as under forced routing, and where every expert is chosen.
"""

from __future__ import annotations

import numpy as np

from titan_moe_lb.balancing.recording.score_sums import MARGIN_EDGES, Column
from titan_moe_lb.telemetry.bfloat16_gate import flip_share
from titan_moe_lb.telemetry.metrics.base import Metric
from titan_moe_lb.telemetry.metrics.scores import OfScores
from titan_moe_lb.telemetry.rank_step import RankStep, ScoreStep


class SelectionMargin(OfScores):
    """Margin of the choice, in selection scores."""

    name = "selection_margin"
    title = "margin of the choice"
    description = (
        "Selection score (bias and group limit included) of the last chosen expert less that of the "
        "first not chosen, mean over tokens"
    )

    def of_scores(self, scores: ScoreStep, step: RankStep) -> np.ndarray:
        """Compute the mean margin."""
        return scores.of_margin(scores.mean(Column.MARGIN))


class _MarginBelow(OfScores):
    """Base class of the shares of the tokens with a small relative margin."""

    edge: int
    """Index in :data:`MARGIN_EDGES`."""

    def of_scores(self, scores: ScoreStep, step: RankStep) -> np.ndarray:
        """Compute the share."""
        return scores.of_margin(_below(scores, self.edge))


MARGIN_BELOW: list[type[Metric]] = [
    type(
        f"MarginBelow{round(1 / edge)}",
        (_MarginBelow,),
        {
            "__module__": __name__,
            "name": f"margin_below_1_{round(1 / edge)}",
            "title": f"tokens with a margin below 1/{round(1 / edge)}",
            "description": (
                f"Share of tokens that a change of the logits by 1/{round(1 / edge)} of their RMS "
                "could route to another expert"
            ),
            "edge": index,
        },
    )
    for index, edge in enumerate(MARGIN_EDGES)
]
"""Histogram of the relative margin, as shares below its edges.

The relative margin is the margin over the slope of the score function and over the token's RMS logit.
"""


class Bfloat16Flips(OfScores):
    """Share of tokens that a gate in bfloat16 would route to other experts, estimated."""

    name = "bfloat16_flip_share"
    title = "flips of a bfloat16 gate"

    def of_scores(self, scores: ScoreStep, step: RankStep) -> np.ndarray:
        """Estimate the share from the histogram of the margin."""
        shares_NH = np.stack([_below(scores, edge) for edge in range(len(MARGIN_EDGES))], axis=1)
        mean_N = scores.mean(Column.NEXT_LOGIT)
        deviation_N = np.sqrt((scores.mean_square(Column.NEXT_LOGIT) - mean_N**2).clip(min=0))
        rms_N = scores.mean(Column.LOGIT_NORM) / np.sqrt(scores.num_experts_N)
        rounded_N = scores.mean(Column.ROUNDED)
        biased_N = np.zeros(len(mean_N), dtype=bool)
        if step.bias_NE is not None:
            biased_N = np.array(
                [len(np.unique(row_E[~np.isnan(row_E)])) > 1 for row_E in step.bias_NE]
            )
        flips = [
            flip_share(
                shares_NH[n],
                MARGIN_EDGES,
                next_logit=(mean_N[n], deviation_N[n]),
                logit_rms=rms_N[n],
                rounded=rounded_N[n],
                biased=bool(biased_N[n]),
            )
            for n in range(len(mean_N))
        ]
        return scores.of_margin(np.array(flips))


def _below(scores: ScoreStep, edge: int) -> np.ndarray:
    return 1 - scores.mean(Column.EXCEEDS + edge)

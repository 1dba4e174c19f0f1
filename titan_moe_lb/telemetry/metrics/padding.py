"""Metric of the share of padding in the routed tokens."""

from __future__ import annotations

import numpy as np

from titan_moe_lb.balancing.router import LoadBalancedRouter
from titan_moe_lb.telemetry.metrics.base import Metric, Reduction
from titan_moe_lb.telemetry.rank_step import RankStep


class PaddingShare(Metric):
    """Share of the routed tokens that are padding: dispatched, and not learned from."""

    name = "padding_share"
    over_ranks = Reduction.MAX
    of_step = True

    @classmethod
    def applies_to(cls, router: LoadBalancedRouter.Config) -> bool:
        """Return True if batches have a token mask."""
        return router.loop.padded

    def measure(self, step: RankStep) -> np.ndarray | None:
        """Compute the share from the counts over all ranks; None without a token mask."""
        if step.valid_counts_NE is None:
            return None
        valid_N, routed_N = (
            counts_NE.clip(min=0).sum(axis=1)
            for counts_NE in (step.valid_counts_NE, step.global_counts_NE)
        )
        return (routed_N - valid_N) / np.maximum(routed_N, 1)

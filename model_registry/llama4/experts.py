"""Routed experts whose input, not output, is weighted by the score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torchtitan.models.common.moe import RoutedExperts


class InputWeightedExperts(RoutedExperts):
    """Llama 4's experts: E(s x) where torchtitan computes s E(x).

    The token dispatcher of torchtitan weights what comes back from the experts. With one
    expert per token, weighting the token before it is dispatched and combining with ones
    is the same computation, with any dispatcher. With more, the copies of a token would
    need different weights, so ``top_k`` has to be 1.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(RoutedExperts.Config):
        def __post_init__(self) -> None:
            if self.token_dispatcher.top_k != 1:
                raise ValueError(
                    f"experts with weighted input take top_k 1, not {self.token_dispatcher.top_k}"
                )

    # The parameter names are part of the contract: torchtitan's local_map looks the
    # shardings up by them.
    def forward(
        self,
        x_BLD: torch.Tensor,
        topk_scores_BLK: torch.Tensor,
        topk_expert_ids_BLK: torch.Tensor,
        num_local_tokens_per_expert_E: torch.Tensor,
    ) -> torch.Tensor:
        """Scores ``(B, L, 1)`` float32; output ``(B, L, D)`` in the dtype of ``x_BLD``."""
        weighted_BLD = (x_BLD.float() * topk_scores_BLK).type_as(x_BLD)
        return super().forward(
            weighted_BLD,
            torch.ones_like(topk_scores_BLK),
            topk_expert_ids_BLK,
            num_local_tokens_per_expert_E,
        )

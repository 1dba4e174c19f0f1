"""Attention and experts of Llama 4, where torchtitan's own differ."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torchtitan.models.common.moe import RoutedExperts
from torchtitan.models.common.rope import CosSinRoPE


class AttentionTemperature(CosSinRoPE):
    """No rotation; queries grow with their position, so that long attention stays sharp.

    The query at position p is multiplied by
    ``1 + attn_scale * log(1 + floor((p + 1) / floor_scale))``: scalable softmax (arXiv
    2501.19399) in the steps of Hugging Face's ``Llama4TextAttention``. Keys stay as they are.

    torchtitan's ``GQAttention`` always has a ``rope`` and gives it queries, keys and
    positions. This one takes its table and look-up by position (global under context
    parallelism), and has one number in it per position.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(CosSinRoPE.Config):
        floor_scale: int = 8192
        """Positions per step of the temperature."""
        attn_scale: float = 0.1
        """Strength; 0 leaves the queries as they are."""

    config: Config

    def _precompute_cache(self) -> torch.Tensor:
        """Temperatures ``(max_seq_len, 1)``, float32."""
        positions = torch.arange(self.config.max_seq_len, dtype=torch.float32)
        steps = torch.floor((positions + 1) / self.config.floor_scale)
        return (1 + self.config.attn_scale * torch.log1p(steps)).unsqueeze(-1)

    @staticmethod
    def apply_rotary_emb(
        query: torch.Tensor, key: torch.Tensor, rope_cache: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return (query.float() * rope_cache).type_as(query), key


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

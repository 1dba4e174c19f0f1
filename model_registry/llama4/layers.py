"""Attention temperature and experts of Llama 4, which torchtitan 0.3.0 lacks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torchtitan.models.common.moe import RoutedExperts
from torchtitan.models.common.rope import CosSinRoPE


class AttentionTemperature(CosSinRoPE):
    """Scaling of queries by position, without rotation, so that long attention stays sharp.

    The query at position p is multiplied by
    ``1 + attn_scale * log(1 + floor((p + 1) / floor_scale))``. This is scalable softmax (arXiv
    2501.19399) with the steps of Hugging Face's ``Llama4TextAttention``. Keys do not change.

    torchtitan's ``GQAttention`` always has a ``rope`` and passes queries, keys and positions to it.
    This class uses the table and the lookup by position (global under context parallelism) of
    RoPE, with one number per position.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(CosSinRoPE.Config):
        floor_scale: int = 8192
        """Positions per step of the temperature."""
        attn_scale: float = 0.1
        """Strength; 0 leaves the queries unchanged."""

    config: Config

    def _precompute_cache(self) -> torch.Tensor:
        """Return the temperatures ``(max_seq_len, 1)``, float32."""
        positions = torch.arange(self.config.max_seq_len, dtype=torch.float32)
        steps = torch.floor((positions + 1) / self.config.floor_scale)
        return (1 + self.config.attn_scale * torch.log1p(steps)).unsqueeze(-1)

    @staticmethod
    def apply_rotary_emb(
        query: torch.Tensor, key: torch.Tensor, rope_cache: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Multiply the queries by their temperatures ``rope_cache``; return the keys unchanged."""
        return (query.float() * rope_cache).type_as(query), key


class InputWeightedExperts(RoutedExperts):
    """Experts with weighted input: Llama 4 computes E(s x), torchtitan s E(x).

    torchtitan's token dispatcher weights the output of the experts. This class weights a token
    before its dispatch and passes weights of one to the dispatcher, which may be of any kind. With
    several experts per token, the copies of a token would need different weights. So ``top_k``
    must be 1.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(RoutedExperts.Config):
        """Config of the experts; raises ``ValueError`` unless ``top_k`` is 1."""

        def __post_init__(self) -> None:
            if self.token_dispatcher.top_k != 1:
                raise ValueError(
                    f"experts with weighted input take top_k 1, not {self.token_dispatcher.top_k}"
                )

    # The parameter names are part of the contract: torchtitan's local_map looks up the
    # shardings by them.
    def forward(
        self,
        x_BLD: torch.Tensor,
        topk_scores_BLK: torch.Tensor,
        topk_expert_ids_BLK: torch.Tensor,
        num_local_tokens_per_expert_E: torch.Tensor,
    ) -> torch.Tensor:
        """Apply the experts to tokens weighted by their scores ``(B, L, 1)``, float32.

        Returns:
            Tokens ``(B, L, D)`` in the dtype of ``x_BLD``.
        """
        weighted_BLD = (x_BLD.float() * topk_scores_BLK).type_as(x_BLD)
        return super().forward(
            weighted_BLD,
            torch.ones_like(topk_scores_BLK),
            topk_expert_ids_BLK,
            num_local_tokens_per_expert_E,
        )

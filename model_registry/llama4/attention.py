"""What the attention of a NoPE layer has in the place of RoPE."""

from __future__ import annotations

from dataclasses import dataclass

import torch
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

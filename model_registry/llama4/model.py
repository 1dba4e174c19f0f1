"""Text decoder of Llama 4, built from torchtitan's own parts.

It uses the block of torchtitan's Qwen3 (grouped-query attention, then a dense or a MoE
feed-forward). So Qwen3's shardings and parallelize function fit it unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torchtitan.models.common.attention import AttentionMasksType, GQAttention, VarlenAttention
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.qwen3.model import Qwen3TransformerBlock
from torchtitan.models.qwen3.sharding import set_qwen3_sharding_config
from torchtitan.models.utils import get_moe_model_nparams_and_flops

from titan_moe_lb.errors import JobError


class Llama4TransformerBlock(Qwen3TransformerBlock):
    """Transformer block that selects its attention mask."""

    @dataclass(kw_only=True, slots=True)
    class Config(Qwen3TransformerBlock.Config):
        mask: Literal["full", "chunked"]
        """Key of ``Llama4Model.get_attention_masks``."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.mask = config.mask

    def forward(
        self,
        x: torch.Tensor,
        attention_masks: AttentionMasksType | None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute hidden states ``(B, L, D)`` with this block's mask of ``attention_masks``."""
        assert isinstance(attention_masks, dict)
        return super().forward(x, attention_masks[self.mask], positions)


class Llama4Model(Decoder):
    """Text decoder of Llama 4."""

    @dataclass(kw_only=True, slots=True)
    class Config(Decoder.Config):
        chunk_size: int
        """Tokens of a document that attend to each other in a layer with chunked attention."""

        def update_from_config(self, *, config, **kwargs) -> None:
            """Bind the model to a job."""
            Decoder.Config.update_from_config(self, config=config, **kwargs)
            parallelism = config.parallelism
            if parallelism.context_parallel_degree > 1 and isinstance(
                self.layers[0].attention.inner_attention, VarlenAttention.Config
            ):
                raise JobError(
                    'attn_backend "varlen" cannot be split over context-parallel ranks: set '
                    '[model] attn_backend = "flex" or parallelism.context_parallel_degree 1'
                )
            set_qwen3_sharding_config(
                self,  # type: ignore[arg-type]
                enable_sp=parallelism.enable_sequence_parallel,
                enable_ep=parallelism.expert_parallel_degree > 1,
            )

        def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
            """Return the number of parameters, and FLOPs per token with chunked attention."""
            attention = self.layers[0].attention
            assert isinstance(attention, GQAttention.Config) and attention.head_dim is not None
            head_dims = 2 * attention.head_dim
            num_parameters, flops = get_moe_model_nparams_and_flops(
                self, model, attention.n_heads, head_dims, seq_len
            )
            chunked = sum(layer.mask == "chunked" for layer in self.layers)
            out_of_reach = max(seq_len - self.chunk_size, 0)
            return (
                num_parameters,
                flops - 6 * chunked * attention.n_heads * head_dims * out_of_reach,
            )

    config: Config

    def get_attention_masks(self, positions: torch.Tensor) -> AttentionMasksType | None:
        """Make the causal masks "full" and "chunked" of packed documents.

        A token sees no token before its chunk, just as it sees none before its document. So the
        chunked mask is the document mask of positions that restart with every chunk, for flex and
        varlen alike. Chunks are counted from the start of the document, like positions of RoPE and
        temperature. So packing with other documents does not change the result.

        Args:
            positions: position of each token in its document ``(B, L)``.
        """
        full = super().get_attention_masks(positions)
        if positions.shape[1] <= self.config.chunk_size:
            return {"full": full, "chunked": full}  # type: ignore[dict-item]
        chunked = super().get_attention_masks(positions % self.config.chunk_size)
        return {"full": full, "chunked": chunked}  # type: ignore[dict-item]

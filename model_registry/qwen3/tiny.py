"""A Qwen3 MoE small enough for tests, with the routing of the real ones."""

from __future__ import annotations

from functools import partial

from torch import nn
from torchtitan.models.common import CosSinRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.config_utils import (
    get_attention_config,
    make_gqa_config,
    make_moe_config,
    make_routed_experts_config,
    make_router_config,
)
from torchtitan.models.qwen3 import Qwen3Model
from torchtitan.models.qwen3.model import Qwen3TransformerBlock


def tiny(attn_backend: str, moe_comm_backend: str) -> Qwen3Model.Config:
    """Four MoE layers of width 64; softmax scores, normalised over the top 2 of 8 experts."""
    dim, head_dim, vocab_size, num_experts, top_k = 64, 16, 2048, 8, 2
    normal = partial(nn.init.normal_, std=0.02)
    linear = {"weight": normal, "bias": nn.init.zeros_}

    def norm(size: int) -> RMSNorm.Config:
        return RMSNorm.Config(normalized_shape=size, eps=1e-6, param_init={"weight": nn.init.ones_})

    def layer() -> Qwen3TransformerBlock.Config:
        return Qwen3TransformerBlock.Config(
            attention_norm=norm(dim),
            ffn_norm=norm(dim),
            attention=make_gqa_config(
                dim=dim,
                n_heads=4,
                n_kv_heads=2,
                head_dim=head_dim,
                wqkv_param_init=linear,
                wo_param_init=linear,
                inner_attention=get_attention_config(attn_backend),
                fuse_qkv=True,
                rope=CosSinRoPE.Config(dim=head_dim, max_seq_len=4096, theta=1000000.0),
                qk_norm=norm(head_dim),
            ),
            moe=make_moe_config(
                num_experts=num_experts,
                router=make_router_config(
                    dim=dim,
                    num_experts=num_experts,
                    gate_param_init=linear,
                    top_k=top_k,
                    score_func="softmax",
                    route_norm=True,
                ),
                routed_experts=make_routed_experts_config(
                    dim=dim,
                    hidden_dim=32,
                    num_experts=num_experts,
                    top_k=top_k,
                    param_init={"w1_EFD": normal, "w2_EDF": normal, "w3_EFD": normal},
                    comm_backend=moe_comm_backend,
                ),
            ),
        )

    return Qwen3Model.Config(
        vocab_size=vocab_size,
        dim=dim,
        norm=norm(dim),
        tok_embeddings=Embedding.Config(
            num_embeddings=vocab_size, embedding_dim=dim, param_init={"weight": normal}
        ),
        lm_head=Linear.Config(in_features=dim, out_features=vocab_size, param_init=linear),
        layers=[layer() for _ in range(4)],
    )

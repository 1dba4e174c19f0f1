"""A DeepSeek-V3 small enough for tests, with the routing of the 671B model."""

from __future__ import annotations

import copy
from functools import partial

from torch import nn
from torchtitan.config.override import derive
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.deepseek_v3 import (
    DeepSeekV3Model,
    MTPTransformerBlock,
    build_mla_moe_layers,
)
from torchtitan.models.deepseek_v3.model import DeepSeekV3TransformerBlock


def tiny(
    attn_backend: str,
    moe_comm_backend: str,
    non_blocking_capacity_factor: float | None = None,
    num_mtp_layers: int = 0,
) -> DeepSeekV3Model.Config:
    """Four layers (the first dense) of width 64; sigmoid scores, 2 of 4 expert groups, top 2."""
    dim, vocab_size, rope_dim = 64, 2048, 16
    linear = {"weight": partial(nn.init.trunc_normal_, std=0.02), "bias": nn.init.zeros_}
    norm = {"weight": nn.init.ones_}
    experts = {
        name: partial(nn.init.trunc_normal_, std=0.02) for name in ("w1_EFD", "w2_EDF", "w3_EFD")
    }
    layers = build_mla_moe_layers(
        n_layers=4,
        n_dense_layers=1,
        dim=dim,
        n_heads=4,
        q_lora_rank=0,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=rope_dim,
        v_head_dim=16,
        mscale=1.0,
        dense_hidden_dim=128,
        moe_hidden_dim=32,
        num_experts=8,
        num_shared_experts=1,
        router_top_k=2,
        router_score_func="sigmoid",
        router_num_expert_groups=4,
        router_num_limited_groups=2,
        router_route_scale=2.5,
        router_route_norm=True,
        attn_backend=attn_backend,
        moe_comm_backend=moe_comm_backend,
        non_blocking_capacity_factor=non_blocking_capacity_factor,
        linear_init=linear,
        norm_init=norm,
        depth_init=lambda layer_id: linear,
        depth_experts_init=lambda layer_id: experts,
        rope=ComplexRoPE.Config(dim=rope_dim, max_seq_len=4096, theta=10000.0),
    )
    return DeepSeekV3Model.Config(
        vocab_size=vocab_size,
        dim=dim,
        tok_embeddings=Embedding.Config(
            num_embeddings=vocab_size,
            embedding_dim=dim,
            param_init={"weight": partial(nn.init.normal_, std=1.0)},
        ),
        norm=RMSNorm.Config(normalized_shape=dim, param_init=norm),
        lm_head=Linear.Config(in_features=dim, out_features=vocab_size, param_init=linear),
        layers=layers,
        mtp_layers=[_mtp_layer(layers[-1], dim) for _ in range(num_mtp_layers)],
    )


def _mtp_layer(layer: DeepSeekV3TransformerBlock.Config, dim: int) -> MTPTransformerBlock.Config:
    """A multi-token prediction block of the same kind as ``layer``."""
    own = copy.deepcopy(layer)
    return derive(
        own,
        MTPTransformerBlock.Config,
        enorm=RMSNorm.Config(normalized_shape=dim),
        hnorm=RMSNorm.Config(normalized_shape=dim),
        eh_proj=Linear.Config(in_features=dim * 2, out_features=dim, bias=False),
        mtp_norm=RMSNorm.Config(normalized_shape=dim),
    )

"""A DeepSeek-V3 small enough for tests, with the routing of the 671B model."""

from __future__ import annotations

from functools import partial

from torch import nn
from torchtitan.models import deepseek_v3 as upstream
from torchtitan.models.common import ComplexRoPE

from model_registry.entry import resized


def tiny(
    attn_backend: str,
    moe_comm_backend: str,
    non_blocking_capacity_factor: float | None = None,
    num_mtp_layers: int = 0,
) -> upstream.DeepSeekV3Model.Config:
    """Four layers (the first dense) of width 64; sigmoid scores, 2 of 4 expert groups, top 2."""
    dim, rope_dim = 64, 16
    linear = {"weight": partial(nn.init.normal_, std=0.02), "bias": nn.init.zeros_}
    experts = {name: partial(nn.init.normal_, std=0.02) for name in ("w1_EFD", "w2_EDF", "w3_EFD")}
    layers = upstream.build_mla_moe_layers(
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
        norm_init={"weight": nn.init.ones_},
        depth_init=lambda layer_id: linear,
        depth_experts_init=lambda layer_id: experts,
        rope=ComplexRoPE.Config(dim=rope_dim, max_seq_len=4096, theta=10000.0),
    )
    config = resized(
        upstream.deepseekv3_configs["debugmodel"](attn_backend, moe_comm_backend), dim, layers
    )
    config.lm_head.param_init = linear
    config.mtp_layers = upstream._build_mtp_layers(
        layers[-1], dim=dim, num_mtp_layers=num_mtp_layers
    )
    return config

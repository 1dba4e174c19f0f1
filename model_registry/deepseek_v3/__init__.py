"""DeepSeek-V3: Multi-head Latent Attention, shared and routed experts (arXiv 2412.19437).

The flavors are torchtitan's (``debugmodel``, ``16B``, ``236B``, ``671B``) and ``tiny``, for tests.
``16B`` and ``236B`` are DeepSeek-V2-Lite and DeepSeek-V2 (arXiv 2405.04434). They route by softmax
scores, and only losses balance them.
"""

from __future__ import annotations

import dataclasses
from functools import partial

from torch import nn
from torchtitan.models import deepseek_v3 as upstream
from torchtitan.models.common import ComplexRoPE
from torchtitan.protocols.model_spec import ModelSpec

from model_registry.deepseek_v3.defaults import DEFAULTS
from model_registry.entry import registry_entry, resized
from titan_moe_lb.errors import JobError
from titan_moe_lb.upstream.layer_builders import deepseek_v3_mtp_layers

FLAVORS = (*upstream.deepseekv3_configs, "tiny")


@registry_entry("deepseek_v3", FLAVORS, DEFAULTS)
def model_registry(
    flavor: str,
    attn_backend: str = "flex",
    moe_comm_backend: str = "standard",
    non_blocking_capacity_factor: float | None = None,
    num_mtp_layers: int = 0,
) -> ModelSpec:
    """Build the spec of a DeepSeek-V3.

    Args:
        flavor: one of ``FLAVORS``.
        attn_backend: as in torchtitan's own entry.
        moe_comm_backend: as in torchtitan's own entry.
        non_blocking_capacity_factor: as in torchtitan's own entry.
        num_mtp_layers: as in torchtitan's own entry.

    Raises:
        JobError: ``num_mtp_layers`` is negative.
    """
    if num_mtp_layers < 0:
        raise JobError(f"num_mtp_layers is {num_mtp_layers}; it must be at least 0")
    build = tiny if flavor == "tiny" else upstream.deepseekv3_configs[flavor]
    return dataclasses.replace(
        upstream.model_registry("debugmodel"),
        flavor=flavor,
        model=build(
            attn_backend=attn_backend,
            moe_comm_backend=moe_comm_backend,
            non_blocking_capacity_factor=non_blocking_capacity_factor,
            num_mtp_layers=num_mtp_layers,
        ),
    )


def tiny(
    attn_backend: str,
    moe_comm_backend: str,
    non_blocking_capacity_factor: float | None = None,
    num_mtp_layers: int = 0,
) -> upstream.DeepSeekV3Model.Config:
    """Build a config of four layers of width 64: one dense, then three MoE layers of 8 experts.

    Scores are sigmoids. The top 2 experts are in at most 2 of 4 expert groups.
    """
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
    config.mtp_layers = deepseek_v3_mtp_layers(layers[-1], dim=dim, num_mtp_layers=num_mtp_layers)
    return config

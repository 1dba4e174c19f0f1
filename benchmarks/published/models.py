"""Models of published runs that the registry lacks, built from torchtitan's own parts."""

from __future__ import annotations

import dataclasses

from torch import nn
from torchtitan.models import deepseek_v3, qwen3
from torchtitan.models.common import ComplexRoPE, CosSinRoPE, TransformerBlock
from torchtitan.models.common.config_utils import (
    get_attention_config,
    make_ffn_config,
    make_gqa_config,
    make_moe_config,
    make_routed_experts_config,
    make_router_config,
)
from torchtitan.models.common.nn_modules import RMSNorm
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer

from model_registry import recipes
from model_registry.entry import resized
from titan_moe_lb import balanced

LINEAR = {"weight": nn.init.zeros_}
NORM = {"weight": nn.init.ones_}
EXPERTS = {name: nn.init.zeros_ for name in ("w1_EFD", "w2_EDF", "w3_EFD")}


def glm45_air() -> Trainer.Config:
    """GLM-4.5-Air, 106B: 46 layers, the first dense; 128 experts, top 8, one shared expert.

    The dimensions are from its config.json (huggingface.co/zai-org/GLM-4.5-Air). The biases of
    queries, keys and values are left out. The vocabulary is Qwen3's, 0.25 % larger.
    """
    spec = qwen3.model_registry("235B-A22B")
    layers = [_glm_layer(dense=number == 0) for number in range(46)]
    return _job(spec, "glm45_air", resized(spec.model, 4096, layers))


def deepseek_9b() -> Trainer.Config:
    """DeepSeek-V3 of 9.5B: 16 layers, the first dense; 64 experts, top 8, one shared expert.

    The dimensions are from ``debugmodel_ep8_llep`` in torchtitan/models/deepseek_v3/__init__.py
    of github.com/NousResearch/torchtitan.
    """
    spec = deepseek_v3.model_registry("debugmodel")
    layers = deepseek_v3.build_mla_moe_layers(
        n_layers=16,
        n_dense_layers=1,
        dim=2048,
        n_heads=16,
        q_lora_rank=0,
        kv_lora_rank=512,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        mscale=0.7,
        dense_hidden_dim=8192,
        moe_hidden_dim=1536,
        num_experts=64,
        num_shared_experts=1,
        router_top_k=8,
        router_score_func="sigmoid",
        router_route_scale=2.0,
        router_route_norm=True,
        attn_backend="flex",
        moe_comm_backend="standard",
        non_blocking_capacity_factor=None,
        linear_init=LINEAR,
        norm_init=NORM,
        depth_init=lambda layer_id: LINEAR,
        depth_experts_init=lambda layer_id: EXPERTS,
        rope=ComplexRoPE.Config(dim=32, max_seq_len=4096, theta=10000.0),
    )
    return _job(spec, "deepseek_9b", resized(spec.model, 2048, layers))


def _glm_layer(dense: bool) -> TransformerBlock.Config:
    dim, head_dim, num_experts, top_k, hidden_dim = 4096, 128, 128, 8, 1408
    norm = RMSNorm.Config(normalized_shape=dim, param_init=NORM)

    def feed_forward(hidden_dim: int):
        return make_ffn_config(
            dim=dim, hidden_dim=hidden_dim, w1_param_init=LINEAR, w2w3_param_init=LINEAR
        )

    moe = make_moe_config(
        num_experts=num_experts,
        router=make_router_config(
            dim=dim,
            num_experts=num_experts,
            gate_param_init=LINEAR,
            top_k=top_k,
            route_norm=True,
        ),
        routed_experts=make_routed_experts_config(
            dim=dim,
            hidden_dim=hidden_dim,
            num_experts=num_experts,
            top_k=top_k,
            param_init=EXPERTS,
            comm_backend="standard",
        ),
        shared_experts=feed_forward(hidden_dim),
    )
    return qwen3.model.Qwen3TransformerBlock.Config(
        attention_norm=norm,
        ffn_norm=norm,
        attention=make_gqa_config(
            dim=dim,
            n_heads=96,
            n_kv_heads=8,
            head_dim=head_dim,
            wqkv_param_init=LINEAR,
            wo_param_init=LINEAR,
            inner_attention=get_attention_config("flex"),
            fuse_qkv=True,
            rope=CosSinRoPE.Config(dim=head_dim, max_seq_len=8192, theta=1000000.0),
        ),
        feed_forward=feed_forward(10944) if dense else None,
        moe=None if dense else moe,
    )


def _job(spec: ModelSpec, flavor: str, model) -> Trainer.Config:
    spec = dataclasses.replace(spec, flavor=flavor, model=model)
    return recipes.pretraining(balanced(spec), assets="")

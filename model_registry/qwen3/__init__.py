"""Qwen3 MoE: grouped-query attention with norms on queries and keys, no shared experts.

The flavors are torchtitan's MoE flavors (``debugmodel_moe``, ``30B-A3B``, ``235B-A22B``) and
``tiny``, for tests. The report is arXiv 2505.09388.
"""

from __future__ import annotations

import dataclasses

from torchtitan.models import qwen3 as upstream
from torchtitan.models.common import CosSinRoPE
from torchtitan.protocols.model_spec import ModelSpec

from model_registry.entry import registry_entry, resized
from model_registry.qwen3.defaults import DEFAULTS
from titan_moe_lb.upstream.layer_builders import qwen3_moe_layers

FLAVORS = ("debugmodel_moe", "30B-A3B", "235B-A22B", "tiny")


@registry_entry("qwen3", FLAVORS, DEFAULTS)
def model_registry(
    flavor: str,
    attn_backend: str = "flex",
    moe_comm_backend: str = "standard",
) -> ModelSpec:
    """Build the spec of a Qwen3 MoE.

    Args:
        flavor: one of ``FLAVORS``.
        attn_backend: as in torchtitan's own entry.
        moe_comm_backend: as in torchtitan's own entry.
    """
    build = tiny if flavor == "tiny" else upstream.qwen3_configs[flavor]
    return dataclasses.replace(
        upstream.model_registry("debugmodel_moe"),
        flavor=flavor,
        model=build(attn_backend=attn_backend, moe_comm_backend=moe_comm_backend),
    )


def tiny(attn_backend: str, moe_comm_backend: str) -> upstream.Qwen3Model.Config:
    """Build a config of four MoE layers of width 64, with 8 experts.

    Softmax scores are normalised over the top 2.
    """
    dim, head_dim = 64, 16
    layers = qwen3_moe_layers(
        n_layers=4,
        dim=dim,
        n_heads=4,
        n_kv_heads=2,
        head_dim=head_dim,
        moe_hidden_dim=32,
        num_experts=8,
        top_k=2,
        attn_backend=attn_backend,
        moe_comm_backend=moe_comm_backend,
        rope=CosSinRoPE.Config(dim=head_dim, max_seq_len=4096, theta=1000000.0),
    )
    return resized(upstream.qwen3_configs["debugmodel_moe"](attn_backend), dim, layers)

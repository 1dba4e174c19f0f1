"""A Qwen3 MoE small enough for tests, with the routing of the real ones."""

from __future__ import annotations

from torchtitan.models import qwen3 as upstream
from torchtitan.models.common import CosSinRoPE

from model_registry.entry import resized


def tiny(attn_backend: str, moe_comm_backend: str) -> upstream.Qwen3Model.Config:
    """Four MoE layers of width 64; softmax scores, normalised over the top 2 of 8 experts."""
    dim, head_dim = 64, 16
    layers = upstream._build_qwen3_moe_layers(
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
    debugmodel = upstream.qwen3_configs["debugmodel_moe"](attn_backend=attn_backend)
    return resized(debugmodel, dim, layers)

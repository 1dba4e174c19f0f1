"""A GPT-OSS small enough for tests, with the routing and the attention of the real ones."""

from __future__ import annotations

import dataclasses

from torchtitan.models import gpt_oss as upstream

from model_registry.entry import resized


def tiny(attn_backend: str, moe_comm_backend: str) -> upstream.GptOssModel.Config:
    """Four MoE layers of width 64, the even ones with a sliding window of 128 tokens.

    Softmax scores with a bias in the gate, normalised over the top 2 of 8 experts.
    """
    dim, head_dim, num_experts, top_k = 64, 16, 8, 2
    debugmodel = upstream.gptoss_configs["debugmodel"](
        attn_backend=attn_backend, moe_comm_backend=moe_comm_backend
    )

    def layer(layer_id: int, block):
        """The block of the debug model, smaller."""
        norm = dataclasses.replace(block.ffn_norm, normalized_shape=dim)
        router = block.moe.router
        gate = dataclasses.replace(router.gate, in_features=dim)
        return dataclasses.replace(
            block,
            attention=upstream._make_gptoss_attn_config(
                dim=dim,
                layer_id=layer_id,
                attn_backend=attn_backend,
                n_heads=4,
                n_kv_heads=2,
                head_dim=head_dim,
                sliding_window_size=block.attention.sliding_window_size,
                rope=dataclasses.replace(block.attention.rope, dim=head_dim),
            ),
            attention_norm=norm,
            ffn_norm=dataclasses.replace(norm),
            moe=dataclasses.replace(
                block.moe,
                router=dataclasses.replace(router, gate=gate, top_k=top_k),
                routed_experts=upstream._make_gptoss_experts_config(
                    dim=dim,
                    hidden_dim=48,
                    num_experts=num_experts,
                    layer_id=layer_id,
                    top_k=top_k,
                    moe_comm_backend=moe_comm_backend,
                ),
            ),
        )

    return resized(debugmodel, dim, [layer(*item) for item in enumerate(debugmodel.layers)])

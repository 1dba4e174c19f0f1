"""GPT-OSS: attention sinks, sliding windows on every other layer, gates with a bias.

The flavors are torchtitan's (``debugmodel``, ``20b``, ``120b``) and ``tiny``, for tests. The model
card is arXiv 2508.10925.
"""

from __future__ import annotations

import dataclasses

from torchtitan.models import gpt_oss as upstream
from torchtitan.protocols.model_spec import ModelSpec

from model_registry.entry import registry_entry, resized
from model_registry.gpt_oss.defaults import DEFAULTS
from model_registry.gpt_oss.state_dict_adapter import GptOssStateDictAdapter
from titan_moe_lb.upstream.layer_builders import gpt_oss_attention, gpt_oss_experts

FLAVORS = (*upstream.gptoss_configs, "tiny")


@registry_entry("gpt_oss", FLAVORS, DEFAULTS)
def model_registry(
    flavor: str,
    attn_backend: str = "flex",
    moe_comm_backend: str = "standard",
) -> ModelSpec:
    """Build the spec of a GPT-OSS.

    Args:
        flavor: one of ``FLAVORS``.
        attn_backend: ``flex`` runs everywhere; ``varlen``, torchtitan's own default
            for this model, runs on GPUs only.
        moe_comm_backend: as in torchtitan's own entry.
    """
    build = tiny if flavor == "tiny" else upstream.gptoss_configs[flavor]
    return dataclasses.replace(
        upstream.model_registry("debugmodel"),
        flavor=flavor,
        model=build(attn_backend=attn_backend, moe_comm_backend=moe_comm_backend),
        state_dict_adapter=GptOssStateDictAdapter,
    )


def tiny(attn_backend: str, moe_comm_backend: str) -> upstream.GptOssModel.Config:
    """Build a config of four MoE layers of width 64, the even ones with a window of 128 tokens.

    The gate has a bias, and softmax scores are normalised over the top 2 of 8 experts.
    """
    dim, head_dim, num_experts, top_k = 64, 16, 8, 2
    debugmodel = upstream.gptoss_configs["debugmodel"](
        attn_backend=attn_backend, moe_comm_backend=moe_comm_backend
    )

    def layer(layer_id: int, block):
        """Return a smaller copy of the debug model's block."""
        norm = dataclasses.replace(block.ffn_norm, normalized_shape=dim)
        router = block.moe.router
        gate = dataclasses.replace(router.gate, in_features=dim)
        return dataclasses.replace(
            block,
            attention=gpt_oss_attention(
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
                routed_experts=gpt_oss_experts(
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

"""A GPT-OSS small enough for tests, with the routing and the attention of the real ones."""

from __future__ import annotations

from functools import partial

from torch import nn
from torchtitan.models.common import CosSinRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.attention import FusedQKVLinear, VarlenAttention
from torchtitan.models.common.config_utils import (
    get_attention_config,
    make_router_config,
    make_token_dispatcher_config,
)
from torchtitan.models.common.linear import ScaledBiasRowwiseLinear
from torchtitan.models.common.moe import RoutedExperts
from torchtitan.models.gpt_oss import GptOssModel
from torchtitan.models.gpt_oss.model import Attention, GptOssTransformerBlock
from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts, GptOssMoE

SLIDING_WINDOW = 128


def tiny(attn_backend: str, moe_comm_backend: str) -> GptOssModel.Config:
    """Four MoE layers of width 64, the even ones with a sliding window of 128 tokens.

    Softmax scores with a bias in the gate, normalised over the top 2 of 8 experts.
    """
    dim, hidden_dim, vocab_size = 64, 48, 2048
    n_heads, n_kv_heads, head_dim = 4, 2, 16
    num_experts, top_k = 8, 2
    normal = partial(nn.init.trunc_normal_, std=0.02)
    linear = {"weight": normal, "bias": nn.init.zeros_}
    rope = CosSinRoPE.Config(
        dim=head_dim,
        max_seq_len=131072,
        theta=150000.0,
        scaling="yarn",
        rope_factor=32,
        beta_fast=32.0,
        beta_slow=1.0,
        truncate=False,
        original_seq_len=4096,
    )

    def norm() -> RMSNorm.Config:
        return RMSNorm.Config(normalized_shape=dim, param_init={"weight": nn.init.ones_})

    def attention(sliding_window: int | None) -> Attention.Config:
        inner = get_attention_config(attn_backend)
        if isinstance(inner, VarlenAttention.Config) and sliding_window is not None:
            inner.window_size = (sliding_window - 1, 0)
        return Attention.Config(
            dim=dim,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            qkv_linear=FusedQKVLinear.Config(
                head_dim=head_dim,
                n_heads=n_heads,
                n_kv_heads=n_kv_heads,
                wqkv=Linear.Config(
                    in_features=dim,
                    out_features=(n_heads + 2 * n_kv_heads) * head_dim,
                    bias=True,
                    param_init=linear,
                ),
            ),
            wo=ScaledBiasRowwiseLinear.Config(
                in_features=n_heads * head_dim, out_features=dim, bias=True, param_init=linear
            ),
            sliding_window_size=sliding_window,
            inner_attention=inner,
            param_init={"sinks": normal},
            rope=rope,
        )

    def moe() -> GptOssMoE.Config:
        return GptOssMoE.Config(
            num_experts=num_experts,
            router=make_router_config(
                dim=dim,
                num_experts=num_experts,
                gate_param_init=linear,
                top_k=top_k,
                score_func="softmax",
                route_norm=True,
                bias=True,
            ),
            routed_experts=RoutedExperts.Config(
                inner_experts=GptOssGroupedExperts.Config(
                    dim=dim,
                    hidden_dim=hidden_dim,
                    num_experts=num_experts,
                    param_init={
                        "mlp1_weight_EGD": normal,
                        "mlp1_bias_EG": normal,
                        "mlp2_weight_EDF": normal,
                        "mlp2_bias_ED": normal,
                    },
                ),
                token_dispatcher=make_token_dispatcher_config(
                    num_experts=num_experts,
                    top_k=top_k,
                    comm_backend=moe_comm_backend,
                    hidden_dim=dim,
                ),
            ),
        )

    return GptOssModel.Config(
        vocab_size=vocab_size,
        dim=dim,
        norm=norm(),
        tok_embeddings=Embedding.Config(
            num_embeddings=vocab_size, embedding_dim=dim, param_init={"weight": normal}
        ),
        lm_head=Linear.Config(in_features=dim, out_features=vocab_size, param_init=linear),
        layers=[
            GptOssTransformerBlock.Config(
                attention=attention(SLIDING_WINDOW if layer % 2 == 0 else None),
                attention_norm=norm(),
                ffn_norm=norm(),
                moe=moe(),
            )
            for layer in range(4)
        ],
    )

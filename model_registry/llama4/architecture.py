"""Conversion of the published sizes of a Llama 4 model to its config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn
from torchtitan.config.override import derive
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm, RoPE
from torchtitan.models.common.config_utils import (
    get_attention_config,
    make_ffn_config,
    make_gqa_config,
    make_moe_config,
    make_routed_experts_config,
    make_router_config,
)
from torchtitan.models.common.moe import MoE
from torchtitan.models.common.param_init import depth_scaled_std

from model_registry.llama4.layers import AttentionTemperature, InputWeightedExperts
from model_registry.llama4.model import Llama4Model, Llama4TransformerBlock

_LINEAR_INIT: dict[str, Callable] = {"weight": partial(nn.init.trunc_normal_, std=0.02)}
_NORM_INIT: dict[str, Callable] = {"weight": nn.init.ones_}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes of a model, with the names of torchtitan's configs."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    num_experts: int
    moe_hidden_dim: int
    """Width of a routed expert, and of the shared expert."""
    dense_hidden_dim: int
    """Width of a feed-forward without experts."""
    interleave_moe_layer_step: int
    """Interval of MoE layers: 1, every layer; 2, every second."""
    use_qk_norm: bool
    """Normalize queries and keys of RoPE layers to unit root mean square."""
    max_seq_len: int
    rope_scaling_factor: float | None = None
    """Divisor of the slow frequencies of RoPE, as in Llama 3; None: no scaling."""
    original_max_position_embeddings: int = 8192
    """Wavelength, in tokens, above which a frequency of RoPE is slow."""
    chunk_size: int = 8192
    no_rope_layer_interval: int = 4
    """Interval of layers that have no RoPE and see the whole document."""
    floor_scale: int = 8192
    attn_scale: float = 0.1
    rope_theta: float = 500_000.0

    def config(
        self,
        *,
        attn_backend: str,
        moe_comm_backend: str,
        non_blocking_capacity_factor: float | None = None,
    ) -> Llama4Model.Config:
        """Build the config; see torchtitan's own registry entries for the arguments."""
        output_std = self.dim**-0.5
        return Llama4Model.Config(
            dim=self.dim,
            vocab_size=self.vocab_size,
            chunk_size=self.chunk_size,
            tok_embeddings=Embedding.Config(
                num_embeddings=self.vocab_size,
                embedding_dim=self.dim,
                param_init={"weight": partial(nn.init.normal_, std=1.0)},
            ),
            norm=self._norm(),
            lm_head=Linear.Config(
                in_features=self.dim,
                out_features=self.vocab_size,
                param_init={
                    "weight": partial(
                        nn.init.trunc_normal_, std=output_std, a=-3 * output_std, b=3 * output_std
                    )
                },
            ),
            layers=[
                self._layer(
                    layer_id,
                    attn_backend=attn_backend,
                    moe_comm_backend=moe_comm_backend,
                    non_blocking_capacity_factor=non_blocking_capacity_factor,
                )
                for layer_id in range(self.n_layers)
            ],
        )

    def _layer(
        self, layer_id: int, *, attn_backend: str, **dispatch: object
    ) -> Llama4TransformerBlock.Config:
        has_rope = (layer_id + 1) % self.no_rope_layer_interval != 0
        is_moe = (layer_id + 1) % self.interleave_moe_layer_step == 0
        return Llama4TransformerBlock.Config(
            mask="chunked" if has_rope else "full",
            attention_norm=self._norm(),
            ffn_norm=self._norm(),
            attention=make_gqa_config(
                dim=self.dim,
                n_heads=self.n_heads,
                n_kv_heads=self.n_kv_heads,
                head_dim=self.head_dim,
                wqkv_param_init=_LINEAR_INIT,
                wo_param_init=_depth_init(layer_id),
                inner_attention=get_attention_config(attn_backend),
                # For each state dict, torchtitan gathers a fused projection on every rank and
                # keeps it: 7 GB in Scout.
                fuse_qkv=False,
                rope=self._rope() if has_rope else self._temperature(),
                # Llama 4 normalizes after the rotation, torchtitan before it. The result is the
                # same, because a norm without weights commutes with a rotation.
                qk_norm=RMSNorm.Config(normalized_shape=self.head_dim, elementwise_affine=False)
                if has_rope and self.use_qk_norm
                else None,
            ),
            feed_forward=None
            if is_moe
            else make_ffn_config(
                dim=self.dim,
                hidden_dim=self.dense_hidden_dim,
                w1_param_init=_LINEAR_INIT,
                w2w3_param_init=_depth_init(layer_id),
            ),
            moe=self._moe(layer_id, **dispatch) if is_moe else None,
        )

    def _moe(self, layer_id: int, *, moe_comm_backend, non_blocking_capacity_factor) -> MoE.Config:
        depth_init = _depth_init(layer_id)
        experts = make_routed_experts_config(
            dim=self.dim,
            hidden_dim=self.moe_hidden_dim,
            num_experts=self.num_experts,
            top_k=1,
            param_init={
                "w1_EFD": _LINEAR_INIT["weight"],
                "w2_EDF": depth_init["weight"],
                "w3_EFD": depth_init["weight"],
            },
            comm_backend=moe_comm_backend,
            non_blocking_capacity_factor=non_blocking_capacity_factor,
        )
        return make_moe_config(
            num_experts=self.num_experts,
            router=make_router_config(
                dim=self.dim,
                num_experts=self.num_experts,
                gate_param_init=depth_init,
                top_k=1,
                score_func="sigmoid",
            ),
            routed_experts=derive(experts, InputWeightedExperts.Config),
            shared_experts=make_ffn_config(
                dim=self.dim,
                hidden_dim=self.moe_hidden_dim,
                w1_param_init=_LINEAR_INIT,
                w2w3_param_init=depth_init,
            ),
        )

    def _rope(self) -> RoPE.Config:
        return ComplexRoPE.Config(
            dim=self.head_dim,
            max_seq_len=self.max_seq_len,
            theta=self.rope_theta,
            scaling="none" if self.rope_scaling_factor is None else "llama",
            scaling_factor=self.rope_scaling_factor or 1.0,
            # One boundary between fast and slow frequencies, nothing in between.
            low_freq_factor=1.0,
            high_freq_factor=1.0,
            original_max_position_embeddings=self.original_max_position_embeddings,
        )

    def _temperature(self) -> RoPE.Config:
        return AttentionTemperature.Config(
            dim=self.head_dim,
            max_seq_len=self.max_seq_len,
            floor_scale=self.floor_scale,
            attn_scale=self.attn_scale,
        )

    def _norm(self) -> RMSNorm.Config:
        return RMSNorm.Config(normalized_shape=self.dim, param_init=_NORM_INIT)


def _depth_init(layer_id: int) -> dict[str, Callable]:
    """Return an initializer with a smaller std in deeper layers, as in torchtitan."""
    return {"weight": partial(nn.init.trunc_normal_, std=depth_scaled_std(0.02, layer_id))}

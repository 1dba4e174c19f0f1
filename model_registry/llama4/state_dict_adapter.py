"""Exact conversion of Llama 4 weights to and from Hugging Face checkpoints.

RoPE rotates the same pairs on both sides, so no head is permuted. Names and experts differ.
Hugging Face stores gate and up projection as one ``(E, D, 2F)`` and the down projection as
``(E, F, D)``. Here they are ``(E, F, D)`` twice and ``(E, D, F)``.

A Hugging Face checkpoint has no place for an expert bias. It is left out, and loading a checkpoint
does not change it.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Shard
from torchtitan.protocols.model import BaseModel
from torchtitan.protocols.state_dict_adapter import StateDictAdapter

_TO_HF = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "attention.qkv_linear.wq.weight": "self_attn.q_proj.weight",
    "attention.qkv_linear.wk.weight": "self_attn.k_proj.weight",
    "attention.qkv_linear.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.w1.weight": "feed_forward.gate_proj.weight",
    "feed_forward.w3.weight": "feed_forward.up_proj.weight",
    "feed_forward.w2.weight": "feed_forward.down_proj.weight",
    "moe.router.gate.weight": "feed_forward.router.weight",
    "moe.shared_experts.w1.weight": "feed_forward.shared_expert.gate_proj.weight",
    "moe.shared_experts.w3.weight": "feed_forward.shared_expert.up_proj.weight",
    "moe.shared_experts.w2.weight": "feed_forward.shared_expert.down_proj.weight",
}
_FROM_HF = {theirs: ours for ours, theirs in _TO_HF.items()}
_GATE = "moe.routed_experts.inner_experts.w1_EFD"
_UP = "moe.routed_experts.inner_experts.w3_EFD"
_DOWN = "moe.routed_experts.inner_experts.w2_EDF"
_HF_GATE_UP = "feed_forward.experts.gate_up_proj"
_HF_DOWN = "feed_forward.experts.down_proj"

_TEXT_MODEL = "language_model."
"""Prefix of the text model's names in a checkpoint with vision."""


class Llama4StateDictAdapter(StateDictAdapter):
    """Adapter for ``Llama4ForCausalLM`` and for the text model of ``Llama4ForConditionalGeneration``.

    It reads the names of both and skips the vision tower. It writes the names of the second, as in
    the published checkpoints, if the index in ``hf_assets_path`` has them.
    """

    fqn_to_index_mapping: dict[str, int] | None
    """Number of the file of each name, from the index."""

    def __init__(self, model_config: BaseModel.Config, hf_assets_path: str | None) -> None:
        super().__init__(model_config, hf_assets_path)
        index = self.fqn_to_index_mapping or {}
        self.prefix = _TEXT_MODEL if any(name.startswith(_TEXT_MODEL) for name in index) else ""
        if index:
            self.fqn_to_index_mapping = {
                name: file for name, file in index.items() if name.startswith(self.prefix)
            }

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Convert to Hugging Face; sharded tensors stay sharded.

        Online loading reads into the returned tensors. The experts among them are copies, because
        no view has both projections in one tensor.
        """
        hf_state_dict = {}
        for name, value in state_dict.items():
            layer, place = _split(name, "layers")
            theirs = f"{self.prefix}model.{layer}" if layer else self.prefix
            if place == _GATE:
                gate, up = (_with_whole_hidden_dim(w) for w in (value, state_dict[layer + _UP]))
                hf_state_dict[theirs + _HF_GATE_UP] = _transposed(torch.cat([gate, up], dim=1))
            elif place == _DOWN:
                hf_state_dict[theirs + _HF_DOWN] = _transposed(value)
            elif place not in (_UP, "moe.expert_bias_E"):
                hf_state_dict[theirs + _TO_HF[place]] = value
        return hf_state_dict

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        """Convert from Hugging Face; skip the vision tower and its projector."""
        state_dict = {}
        for name, value in hf_state_dict.items():
            if name.startswith(("vision_model.", "multi_modal_projector.")):
                continue
            layer, place = _split(name.removeprefix(_TEXT_MODEL), "model.layers")
            ours = layer.removeprefix("model.")
            if place == _HF_GATE_UP:
                gate, up = _transposed(value).chunk(2, dim=1)
                state_dict[ours + _GATE], state_dict[ours + _UP] = gate, up
            elif place == _HF_DOWN:
                state_dict[ours + _DOWN] = _transposed(value)
            else:
                state_dict[ours + _FROM_HF[place]] = value
        return state_dict


def _split(name: str, layers: str) -> tuple[str, str]:
    """Split off the layer, as in ``"layers.3.", "attention.wo.weight"``; empty outside of layers."""
    match = re.match(rf"{re.escape(layers)}\.\d+\.", name)
    return (match.group(), name[match.end() :]) if match else ("", name)


def _with_whole_hidden_dim(weight_EFD: torch.Tensor) -> torch.Tensor:
    """Shard D instead of F, by one all-to-all and without a gather.

    Gate and up projection become one tensor along F. If F were sharded, a rank would have two
    separate pieces of it, which no placement describes.
    """
    if not isinstance(weight_EFD, DTensor):
        return weight_EFD
    return weight_EFD.redistribute(
        placements=[
            Shard(2) if getattr(placement, "dim", None) == 1 else placement
            for placement in weight_EFD.placements
        ]
    )


def _transposed(weight: torch.Tensor) -> torch.Tensor:
    """Transpose each expert's matrix."""
    return weight.transpose(1, 2).contiguous()

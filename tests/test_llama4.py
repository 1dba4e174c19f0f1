"""Llama 4 against Hugging Face's own: logits, checkpoints, expert input, packing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torchtitan.config.override import OverrideConfig, apply_overrides
from transformers import Llama4ForCausalLM
from transformers.models.llama4.configuration_llama4 import Llama4TextConfig

from model_registry.llama4.architecture import Architecture
from model_registry.llama4.flavors import FLAVORS
from model_registry.llama4.model import Llama4Model
from model_registry.llama4.state_dict_adapter import Llama4StateDictAdapter

SEQUENCE_LENGTH = 256
TINY = FLAVORS["tiny"]
VARIANTS = {
    "tiny": TINY,
    "like Scout": dataclasses.replace(
        # Half of the frequencies of a head of 16 are slow at this length.
        TINY,
        rope_scaling_factor=16.0,
        original_max_position_embeddings=128,
    ),
    "like Maverick": dataclasses.replace(TINY, interleave_moe_layer_step=2, use_qk_norm=False),
}


def hugging_face(architecture: Architecture) -> Llama4ForCausalLM:
    """The same architecture there, with random weights that make every part matter."""
    rope: dict = {"rope_type": "default", "rope_theta": architecture.rope_theta}
    if architecture.rope_scaling_factor is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": architecture.rope_scaling_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": architecture.original_max_position_embeddings,
        }
    config = Llama4TextConfig(
        vocab_size=architecture.vocab_size,
        hidden_size=architecture.dim,
        intermediate_size=architecture.moe_hidden_dim,
        intermediate_size_mlp=architecture.dense_hidden_dim,
        num_hidden_layers=architecture.n_layers,
        num_attention_heads=architecture.n_heads,
        num_key_value_heads=architecture.n_kv_heads,
        head_dim=architecture.head_dim,
        max_position_embeddings=architecture.max_seq_len,
        num_local_experts=architecture.num_experts,
        interleave_moe_layer_step=architecture.interleave_moe_layer_step,
        use_qk_norm=architecture.use_qk_norm,
        no_rope_layer_interval=architecture.no_rope_layer_interval,
        attention_chunk_size=architecture.chunk_size,
        floor_scale=architecture.floor_scale,
        attn_scale=architecture.attn_scale,
        rope_parameters=rope,
        initializer_range=0.1,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    return Llama4ForCausalLM(config).eval()


def ours(architecture: Architecture) -> Llama4Model:
    """With dense attention, as on the host, and experts in float32."""
    config = architecture.config(attn_backend="flex", moe_comm_backend="standard")
    overrides = [
        "tests.parity.float32_experts.float32_experts",
        "titan_moe_lb.cpu.attention.dense_mask_attention",
    ]
    apply_overrides(OverrideConfig(imports=overrides), config)
    return config.build()


def loaded(architecture: Architecture) -> tuple[Llama4Model, Llama4ForCausalLM]:
    """Both models with the weights of Hugging Face's."""
    theirs, model = hugging_face(architecture), ours(architecture)
    adapter = Llama4StateDictAdapter(model.config, None)
    missing, unexpected = model.load_state_dict(adapter.from_hf(theirs.state_dict()), strict=False)
    assert not unexpected and all(name.endswith("expert_bias_E") for name in missing)
    return model.eval(), theirs


def logits(model: Llama4Model, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, positions, model.get_attention_masks(positions))


def tokens_and_positions(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, TINY.vocab_size, (batch, SEQUENCE_LENGTH), generator=generator)
    return tokens, torch.arange(SEQUENCE_LENGTH).expand(batch, -1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_hugging_face(variant):
    model, theirs = loaded(VARIANTS[variant])
    tokens, positions = tokens_and_positions()
    with torch.no_grad():
        expected = theirs(tokens).logits
    error = (logits(model, tokens, positions) - expected).abs().max()
    assert error < 1e-4
    assert expected.std() > 0.1, "logits too small for 1e-4 to say anything"

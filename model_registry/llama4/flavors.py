"""Sizes of the published Llama 4 models, and of two small ones.

``17Bx16E`` (Scout) and ``17Bx128E`` (Maverick) have the sizes of the ``text_config`` in
``config.json`` of meta-llama/Llama-4-Scout-17B-16E and meta-llama/Llama-4-Maverick-17B-128E. Their
``max_seq_len`` is from the Instruct models; the base model of Scout has 262,144.

Hugging Face counts the vision tower and its projector too:

    flavor    text             vision       Hugging Face
    17Bx16E   107,769,861,120  871,932,416  108,641,793,536 ("109B")
    17Bx128E  400,711,848,960  871,932,416  401,583,781,376 ("400B")
"""

from __future__ import annotations

from dataclasses import replace

from model_registry.llama4.architecture import Architecture

_SCOUT = Architecture(
    dim=5120,
    n_layers=48,
    n_heads=40,
    n_kv_heads=8,
    head_dim=128,
    vocab_size=202_048,
    num_experts=16,
    moe_hidden_dim=8192,
    dense_hidden_dim=16_384,
    interleave_moe_layer_step=1,
    use_qk_norm=True,
    max_seq_len=10_485_760,
    rope_scaling_factor=16.0,
)

ARCHITECTURES: dict[str, Architecture] = {
    # Four layers, for tests: a NoPE layer, and chunks shorter than the sequence.
    "tiny": Architecture(
        dim=64,
        n_layers=4,
        n_heads=4,
        n_kv_heads=2,
        head_dim=16,
        vocab_size=2048,
        num_experts=8,
        moe_hidden_dim=32,
        dense_hidden_dim=64,
        interleave_moe_layer_step=1,
        use_qk_norm=True,
        max_seq_len=4096,
        chunk_size=96,
        floor_scale=32,
    ),
    "debugmodel": Architecture(
        dim=256,
        n_layers=8,
        n_heads=8,
        n_kv_heads=4,
        head_dim=32,
        vocab_size=2048,
        num_experts=8,
        moe_hidden_dim=256,
        dense_hidden_dim=512,
        interleave_moe_layer_step=1,
        use_qk_norm=True,
        max_seq_len=16384,
        chunk_size=128,
        floor_scale=64,
    ),
    "17Bx16E": _SCOUT,
    "17Bx128E": replace(
        _SCOUT,
        num_experts=128,
        interleave_moe_layer_step=2,
        use_qk_norm=False,
        max_seq_len=1_048_576,
        rope_scaling_factor=None,
    ),
}

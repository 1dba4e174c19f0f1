"""Llama 4, text: NoPE layers between chunked RoPE layers, one routed expert per token.

torchtitan 0.3.0 has no Llama 4; this package has the model too.
"""

from __future__ import annotations

import dataclasses

from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.models.qwen3.parallelize import parallelize_qwen3
from torchtitan.protocols.model_spec import ModelSpec

from model_registry.entry import registry_entry
from model_registry.llama4.defaults import DEFAULTS
from model_registry.llama4.flavors import ARCHITECTURES
from model_registry.llama4.state_dict_adapter import Llama4StateDictAdapter
from titan_moe_lb.errors import JobError

FLAVORS = tuple(ARCHITECTURES)


@registry_entry("llama4", FLAVORS, DEFAULTS)
def model_registry(
    flavor: str,
    attn_backend: str = "flex",
    moe_comm_backend: str = "standard",
    non_blocking_capacity_factor: float | None = None,
    interleave_moe_layer_step: int | None = None,
) -> ModelSpec:
    """Build the spec of a Llama 4.

    Args:
        flavor: one of ``FLAVORS``.
        attn_backend: "flex", "flex_flash" or "varlen", as in torchtitan.
        moe_comm_backend: as in torchtitan's own entries.
        non_blocking_capacity_factor: as in torchtitan's own entries.
        interleave_moe_layer_step: interval of MoE layers: 1, every layer; 2, every second; None:
            the flavor's own.

    Raises:
        JobError: ``interleave_moe_layer_step`` is below 1 or above the number of layers.
    """
    architecture = ARCHITECTURES[flavor]
    if interleave_moe_layer_step is not None:
        if not 1 <= interleave_moe_layer_step <= architecture.n_layers:
            raise JobError(
                f"interleave_moe_layer_step is {interleave_moe_layer_step}; llama4 {flavor} "
                f"takes 1 to {architecture.n_layers}, its number of layers"
            )
        architecture = dataclasses.replace(
            architecture, interleave_moe_layer_step=interleave_moe_layer_step
        )
    return ModelSpec(
        name="llama4",
        flavor=flavor,
        model=architecture.config(
            attn_backend=attn_backend,
            moe_comm_backend=moe_comm_backend,
            non_blocking_capacity_factor=non_blocking_capacity_factor,
        ),
        parallelize_fn=parallelize_qwen3,
        pipelining_fn=pipeline_llm,
        post_optimizer_build_fn=None,
        state_dict_adapter=Llama4StateDictAdapter,
    )

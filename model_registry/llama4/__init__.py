"""Llama 4, text: NoPE layers between chunked RoPE layers, one routed expert per token.

torchtitan 0.3.0 has no Llama 4; this room has the model too.
"""

from __future__ import annotations

import dataclasses

from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.models.qwen3.parallelize import parallelize_qwen3
from torchtitan.protocols.model import ModelConfigConverter
from torchtitan.protocols.model_spec import ModelSpec

from model_registry.llama4.flavors import ARCHITECTURES
from model_registry.llama4.state_dict_adapter import Llama4StateDictAdapter
from model_registry.room import Default, check_flavor
from titan_moe_lb.errors import JobError
from titan_moe_lb.forced_routing import ForcedRouting
from titan_moe_lb.losses import AuxLoss, BatchWiseAuxLoss
from titan_moe_lb.model_spec import BalancedModelSpec, balanced, registry_entry

FLAVORS = tuple(ARCHITECTURES)

LOAD_BALANCE_COEFF = Default(
    "load_balance_coeff",
    1e-3,
    "no published value; torchtitan's own default, and DeepSeek-V3's",
)
AUX_LOSSES = Default(
    "aux_losses",
    [BatchWiseAuxLoss.Config(weight=1e-3)],
    "no published value; HF Llama4TextConfig.router_aux_loss_coef default 0.001: a library default",
)
DEFAULTS = (LOAD_BALANCE_COEFF, AUX_LOSSES)


@registry_entry
def model_registry(
    flavor: str,
    attn_backend: str = "flex",
    moe_comm_backend: str = "standard",
    non_blocking_capacity_factor: float | None = None,
    converters: list[ModelConfigConverter.Config] | None = None,
    interleave_moe_layer_step: int | None = None,
    aux_losses: list[AuxLoss.Config] | None = None,
    load_balance_coeff: float | None = LOAD_BALANCE_COEFF.value,
    forced_routing: ForcedRouting.Config | None = None,
) -> BalancedModelSpec:
    """Llama 4 of one flavor, balanced.

    Args:
        flavor: one of ``FLAVORS``.
        attn_backend: "flex", "flex_flash" or "varlen", as in torchtitan.
        moe_comm_backend, non_blocking_capacity_factor, converters: as in torchtitan's own
            entries.
        interleave_moe_layer_step: every how many layers the feed-forward is a MoE; None
            for the flavor's own.
        aux_losses: losses of every router; None for the model's default, an empty
            list for none.
        load_balance_coeff: bias update speed; None turns the expert bias off.
        forced_routing: what decides where tokens go, in a benchmark.

    Raises:
        JobError: unknown flavor, ``interleave_moe_layer_step`` outside the layers.
    """
    check_flavor("llama4", flavor, FLAVORS)
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
    spec = ModelSpec(
        name="llama4",
        flavor=flavor,
        model=architecture.config(
            attn_backend=attn_backend,
            moe_comm_backend=moe_comm_backend,
            non_blocking_capacity_factor=non_blocking_capacity_factor,
        ),
        parallelize_fn=parallelize_qwen3,
        pipelining_fn=pipeline_llm,
        post_optimizer_build_fn=None,  # balanced() sets it
        state_dict_adapter=Llama4StateDictAdapter,
    )
    return balanced(
        spec,
        aux_losses=AUX_LOSSES.value if aux_losses is None else aux_losses,
        load_balance_coeff=load_balance_coeff,
        forced_routing=forced_routing,
        before=converters,
    )

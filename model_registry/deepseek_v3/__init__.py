"""DeepSeek-V3: Multi-head Latent Attention, shared and routed experts (arXiv 2412.19437).

The flavors are torchtitan's (``debugmodel``, ``16B``, ``236B``, ``671B``) and
``tiny``, for tests.
"""

from __future__ import annotations

import dataclasses

from torchtitan.models import deepseek_v3 as upstream
from torchtitan.protocols.model import ModelConfigConverter

from model_registry.deepseek_v3.tiny import tiny
from model_registry.room import Default, check_flavor
from titan_moe_lb.errors import JobError
from titan_moe_lb.forced_routing import ForcedRouting
from titan_moe_lb.losses import AuxLoss, SequenceWiseAuxLoss
from titan_moe_lb.model_spec import BalancedModelSpec, balanced, registry_entry

FLAVORS = (*upstream.deepseekv3_configs, "tiny")

LOAD_BALANCE_COEFF = Default(
    "load_balance_coeff",
    1e-3,
    "bias update speed, arXiv 2412.19437 section 4.2: 0.001 for the first 14.3T tokens",
)
AUX_LOSSES = Default(
    "aux_losses",
    [SequenceWiseAuxLoss.Config(weight=1e-4, count_from="scores")],
    "alpha 0.0001, arXiv 2412.19437 section 4.2; unbiased scores are counted, Eq. 18",
)
DEFAULTS = (LOAD_BALANCE_COEFF, AUX_LOSSES)


@registry_entry
def model_registry(
    flavor: str,
    attn_backend: str = "flex",
    moe_comm_backend: str = "standard",
    non_blocking_capacity_factor: float | None = None,
    converters: list[ModelConfigConverter.Config] | None = None,
    num_mtp_layers: int = 0,
    aux_losses: list[AuxLoss.Config] | None = None,
    load_balance_coeff: float | None = LOAD_BALANCE_COEFF.value,
    forced_routing: ForcedRouting.Config | None = None,
) -> BalancedModelSpec:
    """DeepSeek-V3 of one flavor, balanced.

    Args:
        flavor: one of ``FLAVORS``.
        attn_backend, moe_comm_backend, non_blocking_capacity_factor, converters,
            num_mtp_layers: as in torchtitan's own entry.
        aux_losses: losses of every router; None for the model's default, an empty
            list for none.
        load_balance_coeff: bias update speed; None turns the expert bias off.
        forced_routing: what decides where tokens go, in a benchmark.

    Raises:
        JobError: unknown flavor, negative ``num_mtp_layers``.
    """
    check_flavor("deepseek_v3", flavor, FLAVORS)
    if num_mtp_layers < 0:
        raise JobError(f"num_mtp_layers is {num_mtp_layers}; it must be at least 0")
    build = tiny if flavor == "tiny" else upstream.deepseekv3_configs[flavor]
    spec = dataclasses.replace(
        upstream.model_registry("debugmodel"),
        flavor=flavor,
        model=build(
            attn_backend=attn_backend,
            moe_comm_backend=moe_comm_backend,
            non_blocking_capacity_factor=non_blocking_capacity_factor,
            num_mtp_layers=num_mtp_layers,
        ),
    )
    return balanced(
        spec,
        aux_losses=AUX_LOSSES.value if aux_losses is None else aux_losses,
        load_balance_coeff=load_balance_coeff,
        forced_routing=forced_routing,
        before=converters,
    )

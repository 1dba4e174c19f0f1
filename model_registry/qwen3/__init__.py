"""Qwen3 MoE: grouped-query attention with norms on queries and keys, no shared experts.

The MoE flavors of torchtitan (``debugmodel_moe``, ``30B-A3B``, ``235B-A22B``) and
``tiny``, for tests. Report: arXiv 2505.09388.
"""

from __future__ import annotations

import dataclasses

from torchtitan.models import qwen3 as upstream
from torchtitan.protocols.model import ModelConfigConverter

from model_registry.qwen3.tiny import tiny
from model_registry.room import Default, check_flavor
from titan_moe_lb.forced_routing import ForcedRouting
from titan_moe_lb.losses import AuxLoss, GlobalBatchAuxLoss
from titan_moe_lb.model_spec import BalancedModelSpec, balanced, registry_entry

FLAVORS = ("debugmodel_moe", "30B-A3B", "235B-A22B", "tiny")

LOAD_BALANCE_COEFF = Default(
    "load_balance_coeff",
    None,
    "arXiv 2505.09388 section 2 names no expert bias (torchtitan's own entry: 1e-3)",
)
AUX_LOSSES = Default(
    "aux_losses",
    [GlobalBatchAuxLoss.Config(weight=1e-3)],
    "global-batch loss: arXiv 2505.09388 section 2; its weight is not in the report, "
    "router_aux_loss_coef of the published config.json is 0.001",
)
DEFAULTS = (LOAD_BALANCE_COEFF, AUX_LOSSES)


@registry_entry
def model_registry(
    flavor: str,
    attn_backend: str = "flex",
    moe_comm_backend: str = "standard",
    converters: list[ModelConfigConverter.Config] | None = None,
    aux_losses: list[AuxLoss.Config] | None = None,
    load_balance_coeff: float | None = LOAD_BALANCE_COEFF.value,
    forced_routing: ForcedRouting.Config | None = None,
) -> BalancedModelSpec:
    """Qwen3 MoE of one flavor, balanced.

    Args:
        flavor: one of ``FLAVORS``.
        attn_backend, moe_comm_backend, converters: as in torchtitan's own entry.
        aux_losses: losses of every router; None for the model's default, an empty
            list for none.
        load_balance_coeff: bias update speed; None turns the expert bias off.
        forced_routing: what decides where tokens go, in a benchmark.

    Raises:
        JobError: unknown flavor.
    """
    check_flavor("qwen3", flavor, FLAVORS)
    build = tiny if flavor == "tiny" else upstream.qwen3_configs[flavor]
    spec = dataclasses.replace(
        upstream.model_registry("debugmodel_moe"),
        flavor=flavor,
        model=build(attn_backend=attn_backend, moe_comm_backend=moe_comm_backend),
    )
    return balanced(
        spec,
        aux_losses=AUX_LOSSES.value if aux_losses is None else aux_losses,
        load_balance_coeff=load_balance_coeff,
        forced_routing=forced_routing,
        before=converters,
    )

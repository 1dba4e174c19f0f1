"""Qwen3 MoE: grouped-query attention with norms on queries and keys, no shared experts.

The MoE flavors of torchtitan (``debugmodel_moe``, ``30B-A3B``, ``235B-A22B``) and
``tiny``, for tests. Report: arXiv 2505.09388.
"""

from __future__ import annotations

import dataclasses

from torchtitan.models import qwen3 as upstream
from torchtitan.protocols.model_spec import ModelSpec

from model_registry.entry import Default, registry_entry
from model_registry.qwen3.tiny import tiny
from titan_moe_lb.balancing.losses import GlobalBatchAuxLoss

FLAVORS = ("debugmodel_moe", "30B-A3B", "235B-A22B", "tiny")

EXPERT_BIAS = Default(
    "expert_bias",
    None,
    "arXiv 2505.09388 section 2 names no expert bias (torchtitan's own entry: 1e-3)",
)
AUX_LOSSES = Default(
    "aux_losses",
    [GlobalBatchAuxLoss.Config(weight=1e-3)],
    "global-batch loss: arXiv 2505.09388 section 2; its weight is not in the report, "
    "router_aux_loss_coef of the published config.json is 0.001",
)
DEFAULTS = (EXPERT_BIAS, AUX_LOSSES)


@registry_entry("qwen3", FLAVORS, DEFAULTS)
def model_registry(
    flavor: str,
    attn_backend: str = "flex",
    moe_comm_backend: str = "standard",
) -> ModelSpec:
    """Qwen3 MoE of one flavor.

    Args:
        flavor: one of ``FLAVORS``.
        attn_backend, moe_comm_backend: as in torchtitan's own entry.
    """
    build = tiny if flavor == "tiny" else upstream.qwen3_configs[flavor]
    return dataclasses.replace(
        upstream.model_registry("debugmodel_moe"),
        flavor=flavor,
        model=build(attn_backend=attn_backend, moe_comm_backend=moe_comm_backend),
    )

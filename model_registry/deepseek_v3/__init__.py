"""DeepSeek-V3: Multi-head Latent Attention, shared and routed experts (arXiv 2412.19437).

The flavors are torchtitan's (``debugmodel``, ``16B``, ``236B``, ``671B``) and
``tiny``, for tests.
"""

from __future__ import annotations

import dataclasses

from torchtitan.models import deepseek_v3 as upstream
from torchtitan.protocols.model_spec import ModelSpec

from model_registry.deepseek_v3.tiny import tiny
from model_registry.room import Default, registry_entry
from titan_moe_lb.errors import JobError
from titan_moe_lb.expert_bias import SignBias
from titan_moe_lb.losses import SequenceWiseAuxLoss

FLAVORS = (*upstream.deepseekv3_configs, "tiny")

EXPERT_BIAS = Default(
    "expert_bias",
    SignBias.Config(speed=1e-3),
    "speed 0.001 for the first 14.3T tokens, arXiv 2412.19437 section 4.2",
)
AUX_LOSSES = Default(
    "aux_losses",
    [SequenceWiseAuxLoss.Config(weight=1e-4, count_from="scores")],
    "alpha 0.0001, arXiv 2412.19437 section 4.2; unbiased scores are counted, Eq. 18",
)
DEFAULTS = (EXPERT_BIAS, AUX_LOSSES)


@registry_entry("deepseek_v3", FLAVORS, DEFAULTS)
def model_registry(
    flavor: str,
    attn_backend: str = "flex",
    moe_comm_backend: str = "standard",
    non_blocking_capacity_factor: float | None = None,
    num_mtp_layers: int = 0,
) -> ModelSpec:
    """DeepSeek-V3 of one flavor.

    Args:
        flavor: one of ``FLAVORS``.
        attn_backend, moe_comm_backend: as in torchtitan's own entry.
        non_blocking_capacity_factor, num_mtp_layers: as in torchtitan's own entry.

    Raises:
        JobError: negative ``num_mtp_layers``.
    """
    if num_mtp_layers < 0:
        raise JobError(f"num_mtp_layers is {num_mtp_layers}; it must be at least 0")
    build = tiny if flavor == "tiny" else upstream.deepseekv3_configs[flavor]
    return dataclasses.replace(
        upstream.model_registry("debugmodel"),
        flavor=flavor,
        model=build(
            attn_backend=attn_backend,
            moe_comm_backend=moe_comm_backend,
            non_blocking_capacity_factor=non_blocking_capacity_factor,
            num_mtp_layers=num_mtp_layers,
        ),
    )

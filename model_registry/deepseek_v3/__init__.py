"""DeepSeek-V3: Multi-head Latent Attention, shared and routed experts.

Defaults and their sources (DeepSeek-V3 technical report, arXiv 2412.19437):

- ``load_balance_coeff = 1e-3``: bias update speed gamma, section 4.2 ("0.001 for
  the first 14.3T tokens").
- ``aux_losses = SequenceWise(1e-4, count_from="scores")``: alpha = 0.0001, section
  4.2; f counts the top-K of the unbiased scores, Eq. 18.

The flavors are torchtitan's (``debugmodel``, ``16B``, ``236B``, ``671B``) and
``tiny``, for tests.
"""

from __future__ import annotations

import dataclasses
import difflib

from torchtitan.models import deepseek_v3 as upstream
from torchtitan.protocols.model import ModelConfigConverter

from model_registry.deepseek_v3.tiny import tiny
from titan_moe_lb.converter import LoadBalanceConverter
from titan_moe_lb.errors import JobError
from titan_moe_lb.losses import AuxLoss, SequenceWiseAuxLoss
from titan_moe_lb.model_spec import BalancedModelSpec, balanced, registry_entry

FLAVORS = (*upstream.deepseekv3_configs, "tiny")


def default_aux_losses() -> list[AuxLoss.Config]:
    return [SequenceWiseAuxLoss.Config(weight=1e-4, count_from="scores")]


@registry_entry
def model_registry(
    flavor: str,
    attn_backend: str = "flex",
    moe_comm_backend: str = "standard",
    non_blocking_capacity_factor: float | None = None,
    converters: list[ModelConfigConverter.Config] | None = None,
    num_mtp_layers: int = 0,
    aux_losses: list[AuxLoss.Config] | None = None,
    load_balance_coeff: float | None = 1e-3,
) -> BalancedModelSpec:
    """DeepSeek-V3 of one flavor, balanced.

    Args:
        flavor: one of ``FLAVORS``.
        attn_backend, moe_comm_backend, non_blocking_capacity_factor, converters,
            num_mtp_layers: as in torchtitan's own entry.
        aux_losses: losses of every router; None for the model's default, an empty
            list for none.
        load_balance_coeff: bias update speed; None turns the expert bias off.

    Raises:
        JobError: unknown flavor, negative ``num_mtp_layers``.
    """
    if flavor not in FLAVORS:
        nearest = difflib.get_close_matches(flavor, FLAVORS, n=1, cutoff=0.0)[0]
        raise JobError(
            f"deepseek_v3 has no flavor {flavor!r}; did you mean {nearest!r}? "
            f"(flavors: {', '.join(FLAVORS)})"
        )
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
        LoadBalanceConverter.Config(
            aux_losses=default_aux_losses() if aux_losses is None else aux_losses,
            load_balance_coeff=load_balance_coeff,
        ),
        before=converters,
    )

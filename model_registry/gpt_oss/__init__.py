"""GPT-OSS: attention sinks, sliding windows on every other layer, gates with a bias.

The flavors are torchtitan's (``debugmodel``, ``20b``, ``120b``) and ``tiny``, for
tests. Model card: arXiv 2508.10925.
"""

from __future__ import annotations

import dataclasses

from torchtitan.models import gpt_oss as upstream
from torchtitan.protocols.model import ModelConfigConverter

from model_registry.gpt_oss.state_dict_adapter import GptOssStateDictAdapter
from model_registry.gpt_oss.tiny import tiny
from model_registry.room import Default, check_flavor
from titan_moe_lb.forced_routing import ForcedRouting
from titan_moe_lb.losses import AuxLoss, BatchWiseAuxLoss
from titan_moe_lb.model_spec import BalancedModelSpec, balanced, registry_entry

FLAVORS = (*upstream.gptoss_configs, "tiny")

LOAD_BALANCE_COEFF = Default(
    "load_balance_coeff",
    None,
    "no published value: arXiv 2508.10925 says nothing of balancing (torchtitan's own entry: 1e-3)",
)
AUX_LOSSES = Default(
    "aux_losses",
    [BatchWiseAuxLoss.Config(weight=1e-3)],
    "no published value; 0.001 is the library default of transformers' "
    "GptOssConfig.router_aux_loss_coef (config.json of openai/gpt-oss-20b: 0.9)",
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
    """GPT-OSS of one flavor, balanced.

    Args:
        flavor: one of ``FLAVORS``.
        attn_backend: ``flex`` runs everywhere; ``varlen``, torchtitan's own default
            for this model, on GPUs alone.
        moe_comm_backend, converters: as in torchtitan's own entry.
        aux_losses: losses of every router; None for the model's default, an empty
            list for none.
        load_balance_coeff: bias update speed; None turns the expert bias off.
        forced_routing: what decides where tokens go, in a benchmark.

    Raises:
        JobError: unknown flavor.
    """
    check_flavor("gpt_oss", flavor, FLAVORS)
    build = tiny if flavor == "tiny" else upstream.gptoss_configs[flavor]
    spec = dataclasses.replace(
        upstream.model_registry("debugmodel"),
        flavor=flavor,
        model=build(attn_backend=attn_backend, moe_comm_backend=moe_comm_backend),
        state_dict_adapter=GptOssStateDictAdapter,
    )
    return balanced(
        spec,
        aux_losses=AUX_LOSSES.value if aux_losses is None else aux_losses,
        load_balance_coeff=load_balance_coeff,
        forced_routing=forced_routing,
        before=converters,
    )

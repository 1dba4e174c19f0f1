"""GPT-OSS: attention sinks, sliding windows on every other layer, gates with a bias.

The flavors are torchtitan's (``debugmodel``, ``20b``, ``120b``) and ``tiny``, for
tests. Model card: arXiv 2508.10925.
"""

from __future__ import annotations

import dataclasses

from torchtitan.models import gpt_oss as upstream
from torchtitan.protocols.model_spec import ModelSpec

from model_registry.entry import Default, registry_entry
from model_registry.gpt_oss.state_dict_adapter import GptOssStateDictAdapter
from model_registry.gpt_oss.tiny import tiny
from titan_moe_lb.balancing.losses import BatchWiseAuxLoss

FLAVORS = (*upstream.gptoss_configs, "tiny")

EXPERT_BIAS = Default(
    "expert_bias",
    None,
    "no published value: arXiv 2508.10925 says nothing of balancing (torchtitan's own entry: 1e-3)",
)
AUX_LOSSES = Default(
    "aux_losses",
    [BatchWiseAuxLoss.Config(weight=1e-3)],
    "no published value; 0.001 is the library default of transformers' "
    "GptOssConfig.router_aux_loss_coef (config.json of openai/gpt-oss-20b: 0.9)",
)
DEFAULTS = (EXPERT_BIAS, AUX_LOSSES)


@registry_entry("gpt_oss", FLAVORS, DEFAULTS)
def model_registry(
    flavor: str,
    attn_backend: str = "flex",
    moe_comm_backend: str = "standard",
) -> ModelSpec:
    """GPT-OSS of one flavor.

    Args:
        flavor: one of ``FLAVORS``.
        attn_backend: ``flex`` runs everywhere; ``varlen``, torchtitan's own default
            for this model, on GPUs alone.
        moe_comm_backend: as in torchtitan's own entry.
    """
    build = tiny if flavor == "tiny" else upstream.gptoss_configs[flavor]
    return dataclasses.replace(
        upstream.model_registry("debugmodel"),
        flavor=flavor,
        model=build(attn_backend=attn_backend, moe_comm_backend=moe_comm_backend),
        state_dict_adapter=GptOssStateDictAdapter,
    )

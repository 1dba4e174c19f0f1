"""Balancing of Llama 4 in jobs that set none, with the sources."""

from __future__ import annotations

from model_registry.entry import Default
from titan_moe_lb.balancing.expert_bias import SignBias
from titan_moe_lb.balancing.losses import BatchWiseAuxLoss

DEFAULTS = (
    Default(
        "expert_bias",
        SignBias.Config(speed=1e-3),
        "no published value; speed 0.001 is torchtitan's own default, and DeepSeek-V3's",
    ),
    Default(
        "aux_losses",
        [BatchWiseAuxLoss.Config(weight=1e-3)],
        "no published value; HF Llama4TextConfig.router_aux_loss_coef default 0.001: a library default",
    ),
)

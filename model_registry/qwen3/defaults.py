"""Balancing of Qwen3 MoE in jobs that set none, with the sources."""

from __future__ import annotations

from model_registry.entry import Default
from titan_moe_lb.balancing.losses import GlobalBatchAuxLoss

DEFAULTS = (
    Default(
        "expert_bias",
        None,
        "arXiv 2505.09388 section 2 names no expert bias (torchtitan's own entry: 1e-3)",
    ),
    Default(
        "aux_losses",
        [GlobalBatchAuxLoss.Config(weight=1e-3)],
        "global-batch loss: arXiv 2505.09388 section 2; its weight is not in the report, "
        "router_aux_loss_coef of the published config.json is 0.001",
    ),
)

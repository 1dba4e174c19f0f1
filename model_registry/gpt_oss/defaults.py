"""Balancing of GPT-OSS in jobs that set none, with the sources."""

from __future__ import annotations

from model_registry.entry import Default
from titan_moe_lb.balancing.losses import BatchWiseAuxLoss

DEFAULTS = (
    Default(
        "expert_bias",
        None,
        "no published value: arXiv 2508.10925 says nothing of balancing (torchtitan's own entry: 1e-3)",
    ),
    Default(
        "aux_losses",
        [BatchWiseAuxLoss.Config(weight=1e-3)],
        "no published value; 0.001 is the library default of transformers' "
        "GptOssConfig.router_aux_loss_coef (config.json of openai/gpt-oss-20b: 0.9)",
    ),
)

"""Balancing of DeepSeek-V3 and DeepSeek-V2 in jobs that set none, with the sources."""

from __future__ import annotations

from model_registry.entry import Default
from titan_moe_lb.balancing.expert_bias import SignBias
from titan_moe_lb.balancing.losses import CommunicationLoss, DeviceLevelLoss, SequenceWiseAuxLoss

DEFAULTS = (
    Default(
        "expert_bias",
        SignBias.Config(speed=1e-3),
        "speed 0.001 for the first 14.3T tokens, arXiv 2412.19437 section 4.2",
    ),
    Default(
        "aux_losses",
        [SequenceWiseAuxLoss.Config(weight=1e-4, count_from="scores")],
        "alpha 0.0001, arXiv 2412.19437 section 4.2; unbiased scores are counted, Eq. 18",
    ),
    Default(
        "expert_bias",
        None,
        "arXiv 2405.04434 section 2.2 names no expert bias (torchtitan's own entry: 1e-3)",
        flavors=("16B", "236B"),
    ),
    Default(
        "aux_losses",
        [SequenceWiseAuxLoss.Config(weight=1e-3)],
        "DeepSeek-V2-Lite: alpha1 0.001 and no other loss, arXiv 2405.04434 appendix B.1",
        flavors=("16B",),
    ),
    Default(
        "aux_losses",
        [
            SequenceWiseAuxLoss.Config(weight=0.003),
            DeviceLevelLoss.Config(weight=0.05, num_device_groups=8),
            CommunicationLoss.Config(weight=0.02, num_device_groups=8, devices_per_token=3),
        ],
        "DeepSeek-V2: alpha1 0.003, alpha2 0.05, alpha3 0.02, D = 8, M = 3, "
        "arXiv 2405.04434 section 3.1.2; formulas in section 2.2.3",
        flavors=("236B",),
    ),
)

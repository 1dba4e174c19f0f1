"""Rules that update the bias of the choice: one file each."""

from titan_moe_lb.balancing.expert_bias.base import BiasStep, ExpertBias, SpeedBias
from titan_moe_lb.balancing.expert_bias.frozen import FrozenBias
from titan_moe_lb.balancing.expert_bias.momentum import MomentumBias
from titan_moe_lb.balancing.expert_bias.proportional import ProportionalBias
from titan_moe_lb.balancing.expert_bias.quantile import QuantileBias
from titan_moe_lb.balancing.expert_bias.quantile_trend import QuantileTrendBias
from titan_moe_lb.balancing.expert_bias.sign import SignBias

__all__ = [
    "BiasStep",
    "ExpertBias",
    "FrozenBias",
    "MomentumBias",
    "ProportionalBias",
    "QuantileBias",
    "QuantileTrendBias",
    "SignBias",
    "SpeedBias",
]

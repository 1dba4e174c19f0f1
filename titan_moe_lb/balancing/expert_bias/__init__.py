"""Rules that update the bias of the choice: one file each."""

from titan_moe_lb.balancing.expert_bias.base import BiasStep as BiasStep
from titan_moe_lb.balancing.expert_bias.base import ExpertBias as ExpertBias
from titan_moe_lb.balancing.expert_bias.base import SpeedBias as SpeedBias
from titan_moe_lb.balancing.expert_bias.frozen import FrozenBias as FrozenBias
from titan_moe_lb.balancing.expert_bias.momentum import MomentumBias as MomentumBias
from titan_moe_lb.balancing.expert_bias.proportional import ProportionalBias as ProportionalBias
from titan_moe_lb.balancing.expert_bias.quantile import QuantileBias as QuantileBias
from titan_moe_lb.balancing.expert_bias.quantile_trend import QuantileTrendBias as QuantileTrendBias
from titan_moe_lb.balancing.expert_bias.sign import SignBias as SignBias

"""What moves the bias that is added to the scores for the choice alone: one file a rule."""

from titan_moe_lb.expert_bias.base import ExpertBias
from titan_moe_lb.expert_bias.frozen import FrozenBias
from titan_moe_lb.expert_bias.sign import SignBias

__all__ = ["ExpertBias", "FrozenBias", "SignBias"]

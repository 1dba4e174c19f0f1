"""Cost of imbalance: slowdown, memory, and the expert-parallel degree at which a job breaks.

The formulas are those of NeuSim's MoE routing model, in real units: a load is never
rounded before a ratio is taken, so that a step of one token has no imbalance of its own.
Pure functions on numbers or numpy arrays that broadcast; no torch at module level.
"""

from titan_moe_lb.costmodel.hardware.all_to_all import all_to_all_time
from titan_moe_lb.costmodel.loads.expert_load import expert_load, receiver_skew

__all__ = ["all_to_all_time", "expert_load", "receiver_skew"]

"""Cost model of load imbalance: step time, memory, and the expert-parallel degrees that fit.

The two-level load follows NeuSim's MoE routing model (github.com/platformxlab/NeuSim), with
real numbers of tokens. A load is never rounded before a ratio is taken, so a step of one token
has no imbalance from rounding. The public functions accept numbers or numpy arrays that
broadcast. Only ``costmodel.jobs`` imports torch at module level.
"""

from titan_moe_lb.costmodel.hardware.device import all_to_all_time
from titan_moe_lb.costmodel.loads.expert_load import expert_load, receiver_skew

__all__ = ["all_to_all_time", "expert_load", "receiver_skew"]

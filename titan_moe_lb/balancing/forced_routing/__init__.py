"""Forced routing: what decides where tokens go in a benchmark."""

from titan_moe_lb.balancing.forced_routing.base import ForcedRouting
from titan_moe_lb.balancing.forced_routing.biased_normal import BiasedNormal
from titan_moe_lb.balancing.forced_routing.burst import Burst
from titan_moe_lb.balancing.forced_routing.hot_experts import HotExperts
from titan_moe_lb.balancing.forced_routing.hot_rank import HotRank
from titan_moe_lb.balancing.forced_routing.hot_share import HotShare
from titan_moe_lb.balancing.forced_routing.ragged import Ragged
from titan_moe_lb.balancing.forced_routing.random_balanced import RandomBalanced
from titan_moe_lb.balancing.forced_routing.random_routing import RandomRouting
from titan_moe_lb.balancing.forced_routing.replay import Replay
from titan_moe_lb.balancing.forced_routing.rotating import Rotating
from titan_moe_lb.balancing.forced_routing.round_robin import RoundRobin
from titan_moe_lb.balancing.forced_routing.token_index import TokenIndexRouting
from titan_moe_lb.balancing.forced_routing.zero_load import ZeroLoad

__all__ = [
    "BiasedNormal",
    "Burst",
    "TokenIndexRouting",
    "RandomRouting",
    "ForcedRouting",
    "HotExperts",
    "HotRank",
    "HotShare",
    "Ragged",
    "RandomBalanced",
    "Replay",
    "Rotating",
    "RoundRobin",
    "ZeroLoad",
]

"""Forced routing: what decides where tokens go in a benchmark."""

from titan_moe_lb.forced_routing.base import ForcedRouting
from titan_moe_lb.forced_routing.biased_normal import BiasedNormal
from titan_moe_lb.forced_routing.dealt import DealtRouting
from titan_moe_lb.forced_routing.drawn import DrawnRouting
from titan_moe_lb.forced_routing.hot_rank import HotRank
from titan_moe_lb.forced_routing.random_balanced import RandomBalanced
from titan_moe_lb.forced_routing.replay import Replay
from titan_moe_lb.forced_routing.round_robin import RoundRobin

__all__ = [
    "BiasedNormal",
    "DealtRouting",
    "DrawnRouting",
    "ForcedRouting",
    "HotRank",
    "RandomBalanced",
    "Replay",
    "RoundRobin",
]

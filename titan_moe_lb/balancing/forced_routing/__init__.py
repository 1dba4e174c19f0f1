"""Forced routing: strategies that choose the experts of tokens in a benchmark."""

from titan_moe_lb.balancing.forced_routing.base import ForcedRouting as ForcedRouting
from titan_moe_lb.balancing.forced_routing.biased_normal import BiasedNormal as BiasedNormal
from titan_moe_lb.balancing.forced_routing.burst import Burst as Burst
from titan_moe_lb.balancing.forced_routing.hot_experts import HotExperts as HotExperts
from titan_moe_lb.balancing.forced_routing.hot_rank import HotRank as HotRank
from titan_moe_lb.balancing.forced_routing.hot_share import HotShare as HotShare
from titan_moe_lb.balancing.forced_routing.ragged import Ragged as Ragged
from titan_moe_lb.balancing.forced_routing.random_balanced import RandomBalanced as RandomBalanced
from titan_moe_lb.balancing.forced_routing.random_routing import RandomRouting as RandomRouting
from titan_moe_lb.balancing.forced_routing.replay import Replay as Replay
from titan_moe_lb.balancing.forced_routing.rotating import Rotating as Rotating
from titan_moe_lb.balancing.forced_routing.round_robin import RoundRobin as RoundRobin
from titan_moe_lb.balancing.forced_routing.token_index import TokenIndexRouting as TokenIndexRouting
from titan_moe_lb.balancing.forced_routing.zero_load import ZeroLoad as ZeroLoad

"""Forced routing: strategies that choose the experts of tokens in a benchmark."""

from titan_moe_lb.balancing.forced_routing.base import ForcedRouting as ForcedRouting
from titan_moe_lb.balancing.forced_routing.even import Ragged as Ragged
from titan_moe_lb.balancing.forced_routing.even import RoundRobin as RoundRobin
from titan_moe_lb.balancing.forced_routing.even import ZeroLoad as ZeroLoad
from titan_moe_lb.balancing.forced_routing.hot import Burst as Burst
from titan_moe_lb.balancing.forced_routing.hot import HotExperts as HotExperts
from titan_moe_lb.balancing.forced_routing.hot import HotRank as HotRank
from titan_moe_lb.balancing.forced_routing.hot import HotShare as HotShare
from titan_moe_lb.balancing.forced_routing.hot import Rotating as Rotating
from titan_moe_lb.balancing.forced_routing.random_logits import BiasedNormal as BiasedNormal
from titan_moe_lb.balancing.forced_routing.random_logits import RandomBalanced as RandomBalanced
from titan_moe_lb.balancing.forced_routing.random_logits import RandomRouting as RandomRouting
from titan_moe_lb.balancing.forced_routing.replay import Replay as Replay
from titan_moe_lb.balancing.forced_routing.token_index import TokenIndexRouting as TokenIndexRouting

"""Sizes of one MoE layer, and the share of one rank in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Dispatcher = Literal["standard", "deepep", "low_latency"]


@dataclass(frozen=True, kw_only=True)
class MoELayer:
    """Sizes of one MoE layer."""

    num_experts: int
    top_k: int
    dim: int
    hidden_dim: int
    shared_hidden_dim: int = 0
    """Total hidden size of the shared experts; 0 without any."""
    num_groups: int = 1
    """Expert groups of group-limited routing."""
    num_limited_groups: int = 1
    """Number of groups from which a token may select experts."""
    expert_biases: bool = False
    """True if the experts add biases to the results of their products."""
    neighbouring_choices: bool = False
    """True if a token selects consecutive experts, as under torchtitan's forced balance."""

    @property
    def parameters_per_expert(self) -> int:
        """Number of weights in one expert, without biases."""
        return 3 * self.dim * self.hidden_dim


@dataclass(frozen=True, kw_only=True)
class RankRole:
    """Share of one rank in an MoE layer."""

    tokens_per_rank: int
    """Tokens that the rank routes in one micro-batch."""
    ep_degree: int
    expert_shards: int = 1
    """Tensor-parallel ranks that split the hidden size of each expert; 1 with EP."""
    dispatcher: Dispatcher = "standard"

    @property
    def exchanges(self) -> bool:
        """True if tokens go to other ranks.

        Without EP the local dispatcher is planned for every value of ``dispatcher``. In
        torchtitan only the standard dispatcher falls back to it.
        """
        return self.ep_degree > 1

    @property
    def tokens(self) -> int:
        """Tokens that the EP group routes together."""
        return self.tokens_per_rank * self.ep_degree

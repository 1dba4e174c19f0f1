"""Strategies that send a fixed share of all tokens to hot experts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from titan_moe_lb.balancing.forced_routing.base import require_at_least_one, require_share
from titan_moe_lb.balancing.forced_routing.functional import (
    hot_share_ids,
    placed_experts,
    round_robin_ids,
)
from titan_moe_lb.balancing.forced_routing.token_index import TokenIndexRouting
from titan_moe_lb.errors import JobError


class HotShare(TokenIndexRouting):
    """Send ``fraction`` of all routed tokens to the hot experts and the rest to the cold ones.

    The share holds for every dispatch and for the global batch, to within one token. Hot experts
    share their tokens evenly, and so do cold ones.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(TokenIndexRouting.Config):
        fraction: float
        """Share of all routed tokens that hot experts receive, in (0, 1]."""

        def __post_init__(self) -> None:
            require_share(self._owner.type_name, self.fraction)

        def hot_experts(self) -> list[int]:
            """List the hot experts, ascending."""
            raise NotImplementedError

        def expert_lists(self) -> dict[str, list[int]]:
            """List the hot and the cold experts."""
            assert self.num_experts is not None
            hot = self.hot_experts()
            cold = sorted(set(range(self.num_experts)) - set(hot))
            return {"hot_experts": hot, "cold_experts": cold}

    hot_experts: torch.Tensor
    cold_experts: torch.Tensor

    def deal(self, tokens_T, total_tokens, step) -> torch.Tensor:
        """Assign the fixed share of the choices to the hot experts."""
        return hot_share_ids(
            tokens_T,
            self.top_k,
            self.hot_experts,
            self.cold_experts,
            num_hot_choices=round(self.config.fraction * total_tokens * self.top_k),
            total_tokens=total_tokens,
        )


class HotExperts(HotShare):
    """Send ``fraction`` of all routed tokens to ``num_hot`` experts.

    Contiguous hot experts are the first ones, so the first EP ranks are hot. Spread hot experts are
    floor(i E / num_hot), equally many on every rank to within one: no rank is hot. Source: W1 and
    W3 of Megatron-LM PR 7488.
    """

    type_name: ClassVar[str] = "hot_experts"

    @dataclass(kw_only=True, slots=True)
    class Config(HotShare.Config):
        num_hot: int
        """Number of hot experts."""

        placement: Literal["contiguous", "spread"] = "contiguous"
        """Hot experts: the first ones, or experts at equal distances over all."""

        def __post_init__(self) -> None:
            HotShare.Config.__post_init__(self)
            require_at_least_one(self._owner.type_name, num_hot=self.num_hot)

        def hot_experts(self) -> list[int]:
            """List the hot experts by their placement."""
            assert self.num_experts is not None
            return placed_experts(self.num_hot, self.num_experts, self.placement)


class HotRank(HotShare):
    """Send ``fraction`` of all routed tokens to the experts of the hot EP ranks.

    Fraction 1 is the worst case for the memory of a GPU. Source: W2 of Megatron-LM PR 7488, where
    the first quarter of the experts is hot, on any ranks (``hot_experts`` here).
    """

    type_name: ClassVar[str] = "hot_rank"

    @dataclass(kw_only=True, slots=True)
    class Config(HotShare.Config):
        rank: int | None = None
        """The hot rank of each EP group; or ``ranks``."""

        ranks: list[int] | None = None
        """Several hot ranks of each EP group."""

        def __post_init__(self) -> None:
            HotShare.Config.__post_init__(self)
            if (self.rank is None) == (self.ranks is None):
                raise JobError("hot_rank needs either rank or ranks: the EP ranks to overload")
            if self.ranks is not None and len(set(self.ranks)) != max(len(self.ranks), 1):
                raise JobError(
                    f"hot_rank ranks are {self.ranks}; name at least one rank, each once"
                )

        @property
        def hot_ranks(self) -> list[int]:
            """Hot ranks of each EP group, ascending."""
            return sorted(self.ranks or []) if self.rank is None else [self.rank]

        def hot_experts(self) -> list[int]:
            """List the experts of the hot ranks: torchtitan's rank r has [r E/EP, (r+1) E/EP)."""
            assert self.num_experts is not None
            per_rank = self.num_experts // self.expert_parallel
            return [e for e in range(self.num_experts) if e // per_rank in self.hot_ranks]


class Rotating(HotShare):
    """Route like ``hot_experts`` with neighboring hot experts; every ``period`` steps the next are hot.

    In step s, counted from 0, experts ``(s // period) num_hot + [0, num_hot)`` modulo E are hot,
    also in a resumed job. An expert placement planned from past loads is out of date after each
    change: this workload tests that. Source: W6 of Megatron-LM PR 7488, whose period is 3.
    """

    type_name: ClassVar[str] = "rotating"

    @dataclass(kw_only=True, slots=True)
    class Config(HotShare.Config):
        num_hot: int
        """Number of hot experts."""

        period: int = 3
        """Steps until the next experts are hot."""

        def __post_init__(self) -> None:
            HotShare.Config.__post_init__(self)
            require_at_least_one("rotating", num_hot=self.num_hot, period=self.period)

        def hot_experts(self) -> list[int]:
            """List the hot experts of step 0."""
            return list(range(self.num_hot))

        def different_steps(self) -> list[int]:
            """Return one step for each set of hot experts."""
            assert self.num_experts is not None
            places = self.num_experts // math.gcd(self.num_experts, self.num_hot)
            return [place * self.period for place in range(places)]

    def deal(self, tokens_T, total_tokens, step) -> torch.Tensor:
        """Assign the experts of step 0, shifted by the step."""
        first = step // self.config.period * self.config.num_hot
        return (super().deal(tokens_T, total_tokens, step) + first) % self.num_experts


class Burst(HotExperts):
    """Route as ``round_robin``, and in every ``period``-th step as ``hot_experts``.

    The hot steps are logged as ``period``, ``2 period``, ..., also in a resumed job. A mean over
    many steady steps hides the cost of one such step and of the adaptation to it. Source: W7 of
    Megatron-LM PR 7488, whose period is 4.
    """

    type_name: ClassVar[str] = "burst"

    @dataclass(kw_only=True, slots=True)
    class Config(HotExperts.Config):
        period: int = 4
        """Steps from one burst to the next."""

        def __post_init__(self) -> None:
            HotExperts.Config.__post_init__(self)
            require_at_least_one("burst", period=self.period)

        def expert_lists(self) -> dict[str, list[int]]:
            """Add the order of the experts in a steady step."""
            return {**HotExperts.Config.expert_lists(self), "order": self.even_order()}

        def different_steps(self) -> list[int]:
            """Return a steady step and a burst."""
            return sorted({0, self.period - 1})

    order: torch.Tensor

    def deal(self, tokens_T, total_tokens, step) -> torch.Tensor:
        """Assign experts as in a steady step or as in a burst."""
        period = self.config.period
        steady_TK = self.order[round_robin_ids(tokens_T, self.top_k, self.num_experts)]
        burst_TK = super().deal(tokens_T, total_tokens, step)
        return torch.where(step % period == period - 1, burst_TK, steady_TK)

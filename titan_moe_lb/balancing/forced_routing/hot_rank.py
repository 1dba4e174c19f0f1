"""Fixed share of all tokens on the experts of some EP ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from titan_moe_lb.balancing.forced_routing.hot_share import HotShare
from titan_moe_lb.errors import JobError


class HotRank(HotShare):
    """Send ``fraction`` of all routed tokens to the experts of the hot EP ranks.

    Fraction 1 is the worst case for the memory of a GPU. Source: W2 of Megatron-LM PR 7488, where
    the first quarter of the experts is hot, on any ranks (``hot_experts`` here).
    """

    type_name: ClassVar[str] = "hot_rank"

    @dataclass(kw_only=True, slots=True)
    class Config(HotShare.Config):
        """Settings of ``hot_rank``."""

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

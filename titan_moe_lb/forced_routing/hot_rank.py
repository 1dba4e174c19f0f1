"""A given share of all tokens on the experts of some EP ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from titan_moe_lb.errors import JobError
from titan_moe_lb.forced_routing.base import ForcedRouting
from titan_moe_lb.forced_routing.dealt import DealtRouting
from titan_moe_lb.forced_routing.functional import hot_share_ids


class HotRank(DealtRouting):
    """``fraction`` of all routed tokens goes to the experts of the hot EP ranks.

    The worst case for the memory of a GPU, dosed. The share holds over the tokens that
    an EP group dispatches together, to within one token; hot experts share evenly, and
    so do cold ones.
    """

    type_name: ClassVar[str] = "hot_rank"
    filled_by_job: ClassVar[frozenset[str]] = ForcedRouting.filled_by_job | {"expert_parallel"}

    @dataclass(kw_only=True, slots=True)
    class Config(ForcedRouting.Config):
        rank: int | None = None
        """The hot rank of each EP group; or ``ranks``."""

        ranks: list[int] | None = None
        """Several hot ranks of each EP group."""

        fraction: float
        """Share of all routed tokens, in (0, 1]."""

        expert_parallel: int | None = None
        """EP degree. Filled by ``update_from_config``."""

        def __post_init__(self) -> None:
            if not 0 < self.fraction <= 1:
                raise JobError(f"hot_rank fraction is {self.fraction}; it must be in (0, 1]")
            if (self.rank is None) == (self.ranks is None):
                raise JobError("hot_rank needs either rank or ranks: the EP ranks to overload")
            if self.ranks is not None and len(set(self.ranks)) != max(len(self.ranks), 1):
                raise JobError(
                    f"hot_rank ranks are {self.ranks}; name at least one rank, each once"
                )

        @property
        def hot_ranks(self) -> list[int]:
            return sorted(self.ranks or []) if self.rank is None else [self.rank]

        def update_from_config(self, *, config, num_experts: int, top_k: int) -> None:
            ForcedRouting.Config.update_from_config(
                self, config=config, num_experts=num_experts, top_k=top_k
            )
            self.expert_parallel = config.parallelism.expert_parallel_degree

        def experts(self) -> tuple[list[int], list[int]]:
            """Hot and cold experts: torchtitan gives rank r experts [r E/EP, (r+1) E/EP)."""
            assert self.num_experts is not None and self.expert_parallel is not None
            per_rank = self.num_experts // self.expert_parallel
            hot = [e for e in range(self.num_experts) if e // per_rank in self.hot_ranks]
            return hot, [e for e in range(self.num_experts) if e not in set(hot)]

    hot_experts: torch.Tensor
    cold_experts: torch.Tensor

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._register(device=None)

    def _register(self, device: torch.device | None) -> None:
        for name, experts in zip(("hot", "cold"), self.config.experts(), strict=True):
            ids = torch.tensor(experts, dtype=torch.int64, device=device)
            self.register_buffer(f"{name}_experts", ids, persistent=False)

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        self._register(buffer_device or self.hot_experts.device)

    def deal(self, tokens_T: torch.Tensor, total_tokens: int) -> torch.Tensor:
        return hot_share_ids(
            tokens_T,
            self.top_k,
            self.hot_experts,
            self.cold_experts,
            num_hot_choices=round(self.config.fraction * total_tokens * self.top_k),
            total_tokens=total_tokens,
        )

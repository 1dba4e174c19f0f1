"""Base class of strategies that assign experts by the number of a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from titan_moe_lb.balancing.forced_routing.base import ForcedRouting
from titan_moe_lb.balancing.forced_routing.functional import even_order


class TokenIndexRouting(ForcedRouting):
    """Choose the experts of a token by its number in the step, and by the step.

    The tokens that an EP group dispatches together (one micro-batch of its ranks) have successive
    numbers. A property of every run of successive numbers, to within one token, therefore holds for
    each dispatch and for the global batch. The counts of a step do not depend on the layout. There
    is no seed, and every layer makes the same choice.
    """

    filled_by_job: ClassVar[frozenset[str]] = ForcedRouting.filled_by_job | {
        "expert_parallel",
        "num_micro_batches",
    }
    """Fields of the Config that the router and ``update_from_config`` fill."""

    @dataclass(kw_only=True, slots=True)
    class Config(ForcedRouting.Config):
        expert_parallel: int = 1
        """EP degree. Filled by ``update_from_config``."""

        num_micro_batches: int = 1
        """Forwards of one router in a step. Filled by ``update_from_config``."""

        def update_from_config(self, *, config, num_experts: int, top_k: int) -> None:
            """Fill the fields of the base class, the EP degree and the number of micro-batches."""
            ForcedRouting.Config.update_from_config(
                self, config=config, num_experts=num_experts, top_k=top_k
            )
            self.expert_parallel = config.parallelism.expert_parallel_degree
            assert self.batch_cut is not None
            self.num_micro_batches = self.batch_cut.num_micro_batches

        def expert_lists(self) -> dict[str, list[int]]:
            """Return the lists of experts that ``deal`` reads, by the name of their buffer."""
            return {}

        def tensors(self) -> dict[str, torch.Tensor]:
            """Return the lists of experts as tensors."""
            lists = self.expert_lists().items()
            return {name: torch.tensor(experts, dtype=torch.int64) for name, experts in lists}

        def different_steps(self) -> list[int]:
            """Return one step of each kind that ``deal`` distinguishes."""
            return [0]

        def even_order(self) -> list[int]:
            """Order all experts so that no EP rank is idle."""
            assert self.num_experts is not None and self.top_k is not None
            return even_order(self.num_experts, self.top_k, self.expert_parallel, self.open_groups)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._place, self._num_places, self._num_groups = 0, 1, 1

    def wire(self, groups, layer: int) -> None:
        """Read this rank's place among the ranks that route different tokens."""
        self._place, self._num_places, _group = groups.token_ranks
        self._num_groups = self._num_places // groups.experts.size

    def deal(self, tokens_T: torch.Tensor, total_tokens: int, step: torch.Tensor) -> torch.Tensor:
        """Choose the experts of some tokens.

        Args:
            tokens_T: numbers of the tokens in the global batch of the step, int64 ``(T,)``.
            total_tokens: tokens of this global batch.
            step: finished steps, int64 ``()``: 0 in the step that is logged as 1.

        Returns:
            ``(T, K)`` int64, distinct in a token.
        """
        raise NotImplementedError

    def forward(self, scores_BLE, forward_number, limit_groups) -> torch.Tensor:
        """Choose the experts of the local tokens by their numbers."""
        B, L, _E = scores_BLE.shape
        num_micro_batches = self.config.num_micro_batches
        shard = forward_number % num_micro_batches * self._num_places + self._place
        tokens_T = torch.arange(B * L, device=scores_BLE.device) + shard * (B * L)
        total_tokens = B * L * self._num_places * num_micro_batches
        ids_TK = self.deal(tokens_T, total_tokens, forward_number // num_micro_batches)
        return ids_TK.view(B, L, self.top_k)

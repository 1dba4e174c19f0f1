"""What the strategies share that deal the experts out by the number of a token."""

from __future__ import annotations

import torch

from titan_moe_lb.forced_routing.base import ForcedRouting


class DealtRouting(ForcedRouting):
    """The ranks of an EP group deal as one, each going on where the one before it ends."""

    def __init__(self, config: ForcedRouting.Config) -> None:
        super().__init__(config)
        self._rank, self._num_ranks = 0, 1

    def wire(self, parallel_dims, layer: int) -> None:
        if parallel_dims.ep_enabled:
            self._rank = parallel_dims.get_mesh("ep").get_local_rank()
            self._num_ranks = parallel_dims.ep

    def deal(self, tokens_T: torch.Tensor, total_tokens: int) -> torch.Tensor:
        """The experts of some tokens.

        Args:
            tokens_T: int64 ``(T,)``, their numbers among those that the EP group
                dispatches together.
            total_tokens: how many those are.

        Returns:
            ``(T, K)`` int64, distinct in a token.
        """
        raise NotImplementedError

    def forward(self, scores_BLE, forward_number, limit_groups) -> torch.Tensor:
        B, L, _E = scores_BLE.shape
        first = self._rank * B * L
        tokens_T = torch.arange(first, first + B * L, device=scores_BLE.device)
        return self.deal(tokens_T, B * L * self._num_ranks).view(B, L, self.top_k)

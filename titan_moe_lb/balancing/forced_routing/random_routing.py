"""Base class of the strategies that draw random logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from titan_moe_lb.balancing.forced_routing.base import ForcedRouting
from titan_moe_lb.balancing.forced_routing.functional import hash_seed


class RandomRouting(ForcedRouting):
    """Top-k of random logits, under the group limit of the model.

    Attributes:
        own_seed: seed for the tokens of this rank in this layer, int64 ``()``. Ranks that see the
            same tokens (TP without EP) have the same seed.
        shared_seed: seed of this layer on all ranks, int64 ``()``.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ForcedRouting.Config):
        """Settings of a random strategy."""

        seed: int = 0
        """Seed of the random logits."""

        def tensors(self) -> dict[str, torch.Tensor]:
            """Return zeros for the seeds, which ``wire`` fills."""
            names = ("own_seed", "shared_seed")
            return {name: torch.zeros((), dtype=torch.int64) for name in names}

    own_seed: torch.Tensor
    shared_seed: torch.Tensor

    def wire(self, groups, layer: int) -> None:
        """Set the seeds of the rank and the layer."""
        self.shared_seed.fill_(hash_seed(self.config.seed, layer))
        self.own_seed.fill_(hash_seed(self.config.seed, layer, groups.token_ranks.rank + 1))

    def logits(self, shape: tuple[int, ...], forward_number: torch.Tensor) -> torch.Tensor:
        """Draw random logits of the local tokens.

        Args:
            shape: ``(B, L, E)``.
            forward_number: as in :meth:`ForcedRouting.forward`.
        """
        raise NotImplementedError

    def forward(self, scores_BLE, forward_number, limit_groups) -> torch.Tensor:
        """Select the top-k of random logits."""
        logits_BLE = self.logits(tuple(scores_BLE.shape), forward_number)
        return limit_groups(logits_BLE).topk(self.top_k, dim=-1, sorted=False).indices

"""Experts that one forward of a router has chosen, for another forward of the same tokens."""

from __future__ import annotations

import torch

from titan_moe_lb.balancing.recording.recomputation import is_recomputation


class RouterReplay:
    """Records the choices of a router, or replaces them by earlier ones.

    Attributes:
        notes: save the choices of the running forward in ``seen_BLK``.
        expert_ids_BLK: experts for the running forward, int64 ``(B, L, K)``, negative for a token
            that chooses itself; None: all choose.
        changed_2: choices of the router that were not among those it had to take, and how
            many it had to take, int64 ``(2,)``.
    """

    def __init__(self) -> None:
        self.notes = False
        self.seen_BLK: torch.Tensor | None = None
        self.expert_ids_BLK: torch.Tensor | None = None
        self.changed_2: torch.Tensor | None = None

    def __call__(self, own_BLK: torch.Tensor) -> torch.Tensor:
        """The experts of a forward, from those that the router has chosen, both int64
        ``(B, L, K)``."""
        if self.notes:
            self.seen_BLK = own_BLK
        taken_BLK = self.expert_ids_BLK
        if taken_BLK is None:
            return own_BLK
        known_BLK = taken_BLK >= 0
        if not is_recomputation():
            assert self.changed_2 is not None
            missed_BLK = (own_BLK.unsqueeze(-1) != taken_BLK.unsqueeze(-2)).all(dim=-1)
            missed_BLK = missed_BLK & known_BLK
            self.changed_2.add_(torch.stack([missed_BLK.sum(), known_BLK.sum()]))
        return torch.where(known_BLK, taken_BLK, own_BLK)

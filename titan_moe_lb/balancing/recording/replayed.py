"""Replay of the experts that a router chose in another forward of the same tokens."""

from __future__ import annotations

import torch

from titan_moe_lb.balancing.recording.recomputation import is_recomputation


class RouterReplay:
    """Recording of a router's choices, or their replacement by earlier ones.

    Attributes:
        notes: True to save the choices of the running forward in ``seen_BLK``.
        seen_BLK: choices of the last forward that was recorded, int64 ``(B, L, K)``.
        expert_ids_BLK: experts for the running forward, int64 ``(B, L, K)``, negative where
            the router keeps its own choice; None: it keeps all.
        changed_2: number of the router's choices that are not among the replayed experts, and
            number of the replayed experts, int64 ``(2,)``.
    """

    def __init__(self) -> None:
        self.notes = False
        self.seen_BLK: torch.Tensor | None = None
        self.expert_ids_BLK: torch.Tensor | None = None
        self.changed_2: torch.Tensor | None = None

    def __call__(self, own_BLK: torch.Tensor) -> torch.Tensor:
        """Return the experts of a forward, given the router's own choices.

        Both are int64 ``(B, L, K)``.
        """
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

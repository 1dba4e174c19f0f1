"""Histograms of routers in one table. Torch alone."""

from __future__ import annotations

import torch


def histogram_of(rows: torch.Tensor, num_experts: int, num_bins: int) -> torch.Tensor:
    """Select the histograms of routers, a contiguous part of each row.

    Args:
        rows: rows of routers, ``(..., E, H)``, for the largest E and H.
        num_experts: E of these routers.
        num_bins: H of these routers.
    """
    return rows.flatten(-2)[..., : num_experts * num_bins].unflatten(-1, (num_experts, num_bins))

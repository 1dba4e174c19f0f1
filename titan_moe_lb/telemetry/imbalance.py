"""How uneven a load is. Pure functions on counts; imports torch alone."""

from __future__ import annotations

import torch


def max_violation(counts_E: torch.Tensor) -> torch.Tensor:
    """MaxVio: how far the most loaded expert is above the balanced load, relative to it.

    Source: arXiv 2408.15664, Eq. 4: ``max_i Load_i / mean_i Load_i - 1``.

    Args:
        counts_E: tokens per expert ``(..., E)``, any numeric dtype.

    Returns:
        ``(...)`` floating point: 0 at perfect balance, E/K - 1 at worst (all tokens on the
        same K experts), and 0 where nothing was routed.
    """
    counts_E = counts_E.to(torch.promote_types(counts_E.dtype, torch.float32))
    mean = counts_E.mean(dim=-1)
    return torch.where(mean > 0, counts_E.amax(dim=-1) / mean.clamp_min(1e-30) - 1, 0.0)

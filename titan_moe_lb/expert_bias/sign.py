"""The aux-loss-free bias: experts with too few tokens are favoured in the next step."""

from __future__ import annotations

import torch


def bias_update(counts_E: torch.Tensor, speed: float) -> torch.Tensor:
    """What to add to the expert bias after a step.

    ``speed * sign(mean_j n_j - n_i)``, less its mean, so that the bias keeps its mean:
    the rule of torchtitan 0.3.0. Source of the sign update: arXiv 2408.15664, Algorithm 1.

    Args:
        counts_E: tokens per expert of the whole step ``(..., E)``, any numeric dtype.
        speed: u in the paper, gamma in DeepSeek-V3.

    Returns:
        float32 ``(..., E)``.
    """
    counts_E = counts_E.float()
    delta_E = speed * torch.sign(counts_E.mean(dim=-1, keepdim=True) - counts_E)
    return delta_E - delta_E.mean(dim=-1, keepdim=True)

"""Capacity factor of an expert-parallel rank: the buffer size that a load needs.

The factor is the capacity of a rank over the tokens that it receives at balance, as in
Megatron's ``moe_expert_rank_capacity_factor``.
"""

from __future__ import annotations

import numpy as np


def capacity_factor(received: np.ndarray, drop_share: float = 0.0) -> np.ndarray:
    """Compute the smallest capacity factor that drops at most a share of the tokens.

    Args:
        received: tokens of each rank in each micro-batch ``(..., M, R)``; every micro-batch
            routes the same number.
        drop_share: share of all tokens that may be dropped; 0 for a factor that drops none.

    Returns:
        float64 ``(...)`` in [1 - drop_share, R]; 1 - drop_share at balance and if nothing was
        routed.
    """
    mean = received.mean(axis=-1, keepdims=True, dtype=np.float64)
    loads = np.where(mean > 0, received / np.where(mean > 0, mean, 1.0), 1.0)
    descending = -np.sort(-loads.reshape(*loads.shape[:-2], -1), axis=-1)
    # With capacity c, the k fullest buffers drop their sum less k c. The total that is dropped is
    # the maximum over k, so c must suffice for every k.
    allowed = drop_share * descending.sum(axis=-1, keepdims=True)
    number = np.arange(1, descending.shape[-1] + 1)
    return ((descending.cumsum(axis=-1) - allowed) / number).max(axis=-1)


def non_blocking_capacity_factor(
    factor: float, *, num_experts: int, top_k: int, ep_degree: int
) -> float:
    """Convert a capacity factor to that of torchtitan's HybridEP dispatcher.

    HybridEP measures capacity as a share of the worst case. There, every token of the group
    chooses as many experts of one rank as possible.
    """
    return factor * top_k / (ep_degree * min(num_experts // ep_degree, top_k))

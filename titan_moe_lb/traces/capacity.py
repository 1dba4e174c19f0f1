"""The buffers of an expert-parallel rank: how large they must be for a load.

The capacity factor is the room of a rank over the tokens that it gets at balance, as in
Megatron's ``moe_expert_rank_capacity_factor``.
"""

from __future__ import annotations

import numpy as np


def capacity_factor(received: np.ndarray, drop_share: float = 0.0) -> np.ndarray:
    """The smallest factor with which at most a share of the tokens finds no room.

    Args:
        received: tokens of each rank in each micro-batch ``(..., M, R)``; every micro-batch
            routes as many.
        drop_share: of all tokens; 0 for the factor that never drops.

    Returns:
        float64 ``(...)``, from 1 - drop_share, at balance and where nothing was routed, to R.
    """
    mean = received.mean(axis=-1, keepdims=True, dtype=np.float64)
    loads = np.where(mean > 0, received / np.where(mean > 0, mean, 1.0), 1.0)
    descending = -np.sort(-loads.reshape(*loads.shape[:-2], -1), axis=-1)
    # With room c, the k fullest lose their sum less k c. The loss is the largest of these,
    # so that c must be enough for every k.
    allowed = drop_share * descending.sum(axis=-1, keepdims=True)
    number = np.arange(1, descending.shape[-1] + 1)
    return ((descending.cumsum(axis=-1) - allowed) / number).max(axis=-1)


def non_blocking_capacity_factor(
    factor: float, *, num_experts: int, top_k: int, ep_degree: int
) -> float:
    """The capacity factor as torchtitan's HybridEP dispatcher defines it: a share of the worst case.

    In the worst case every token of the group goes to as many experts of one rank as it can.
    """
    return factor * top_k / (ep_degree * min(num_experts // ep_degree, top_k))

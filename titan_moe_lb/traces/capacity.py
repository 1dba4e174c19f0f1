"""Capacity factor of an expert-parallel rank: the buffer size that a load needs.

The factor is the capacity of a rank over the tokens that it receives at balance, as in
Megatron's ``moe_expert_rank_capacity_factor``. Megatron drops the tokens above it. An overrun of
DistMoE's ``scratch_capacity_factor``, or of its ``vmm_capacity_factor`` where that is set, ends the
job.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    return factor / worst_capacity_factor(num_experts=num_experts, top_k=top_k, ep_degree=ep_degree)


def overrun_factor(
    received: np.ndarray, share: float = 0.0, stages: Sequence[int] | None = None
) -> float:
    """Compute the smallest capacity factor that at most a share of the micro-batches overrun.

    A micro-batch overruns if any rank does, in any layer: DistMoE's ``scratch_capacity_factor`` or
    ``vmm_capacity_factor``. With ``stages``, the layers of a stage share the capacity: its
    ``activation_slot_capacity_factor``.

    Args:
        received: tokens of each rank in each layer and micro-batch ``(N, M, R)``.
        share: share of the micro-batches that may overrun, in [0, 1); 0 for a factor that none did.
        stages: pipeline stage of each layer; None for a capacity of each layer alone.

    Returns:
        Factor in [1, R]; 1 if nothing was routed.
    """
    if stages is not None:
        received = np.stack(
            [received[np.equal(stages, stage)].sum(axis=0) for stage in sorted(set(stages))]
        )
    balanced = received.mean(axis=-1, keepdims=True, dtype=np.float64)
    factors = np.where(balanced > 0, received / np.where(balanced > 0, balanced, 1.0), 1.0)
    return exceeded_by(factors.max(axis=(0, -1)), share)


def exceeded_by(values: np.ndarray, share: float) -> float:
    """Return the smallest of the values that at most a share of them exceed; ignore NaN."""
    known = values[~np.isnan(values)]
    return float(np.quantile(known, 1 - share, method="inverted_cdf")) if known.size else np.nan


def worst_capacity_factor(*, num_experts: int, top_k: int, ep_degree: int) -> float:
    """Compute the factor that no load overruns: each token sends all that it can to one rank."""
    return ep_degree * min(num_experts // ep_degree, top_k) / top_k

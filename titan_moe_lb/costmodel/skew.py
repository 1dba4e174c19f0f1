"""How much more than its share the busiest device of an all-to-all receives."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from titan_moe_lb.costmodel.load import WORST, Array, busiest_device_share, checked


def receiver_skew(
    *,
    num_experts: ArrayLike,
    top_k: ArrayLike,
    ep_degree: ArrayLike,
    imbalance_factor: ArrayLike = WORST,
    num_hot_experts: ArrayLike = 1,
) -> Array:
    """Tokens received by the busiest device over the mean T K / EP.

    It does not depend on the number of tokens. Where EP does not divide E, the busiest
    device has more experts than the mean; that is no imbalance of the routing, so the skew
    is at most the imbalance factor: 1 at balance, never above E/K.

    Args: scalars, or arrays that broadcast; see :func:`expert_load`.

    Returns:
        A float, or an array of the broadcast shape, in [1, E/K]; 1 without EP.

    Raises:
        JobError: an argument outside its range.

    Source: NeuSim's receiver skew of MoE dispatch; the upper bound is ours.
    """
    experts, _k, factor, hot, degree = checked(
        num_experts, top_k, imbalance_factor, num_hot_experts, ep_degree
    )
    above_mean = busiest_device_share(experts, factor, hot, degree) * degree / experts
    return np.where(degree > 1, np.clip(above_mean, 1.0, factor), 1.0)[()]

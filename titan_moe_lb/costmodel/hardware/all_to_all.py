"""Time of one all-to-all between the ranks of an expert-parallel group."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from titan_moe_lb.costmodel.loads.expert_load import Array
from titan_moe_lb.errors import JobError


def all_to_all_time(
    *,
    num_bytes: ArrayLike,
    ep_degree: ArrayLike,
    bandwidth: ArrayLike,
    latency: ArrayLike = 0.0,
    skew: ArrayLike = 1.0,
) -> Array:
    """Time until the busiest rank has received everything, in seconds.

    ``max(bytes x skew / bandwidth, latency x (EP - 1))``. The first term is the transfer to the
    busiest receiver. The second is the start of its messages, one after another. The time is 0
    without expert parallelism.

    Args:
        num_bytes: bytes that a rank receives from the other ranks at balance.
        ep_degree: number of ranks in the group.
        bandwidth: bytes/s that a rank can receive. :meth:`Hardware.all_to_all_time` computes it
            for groups that span several nodes.
        latency: seconds to start one message.
        skew: tokens of the busiest receiver over the mean; see :func:`receiver_skew`.

    Raises:
        JobError: ``ep_degree`` is below 1.
    """
    degree = np.asarray(ep_degree, dtype=np.float64)
    if (degree < 1).any():
        raise JobError("ep_degree must be at least 1")
    transfer = np.asarray(num_bytes) * np.asarray(skew) / np.asarray(bandwidth)
    start = np.asarray(latency) * (degree - 1)
    return np.where(degree > 1, np.maximum(transfer, start), 0.0)[()]

"""The time of one all-to-all between the ranks of an expert-parallel group."""

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
    """Seconds until the busiest rank has received everything.

    ``max(bytes x skew / bandwidth, latency x (EP - 1))``: either the link of the busiest
    receiver is the limit, or the messages are so small that starting them is. None
    without expert parallelism.

    Args:
        num_bytes: bytes that a rank receives from the other ranks at balance.
        ep_degree: ranks.
        bandwidth: bytes/s that a rank can receive. :meth:`Hardware.all_to_all_time` knows it
            for groups that span several nodes.
        latency: seconds to start one message.
        skew: the busiest receiver over the mean; see :func:`receiver_skew`.
    """
    degree = np.asarray(ep_degree, dtype=np.float64)
    if (degree < 1).any():
        raise JobError("ep_degree must be at least 1")
    transfer = np.asarray(num_bytes) * np.asarray(skew) / np.asarray(bandwidth)
    start = np.asarray(latency) * (degree - 1)
    return np.where(degree > 1, np.maximum(transfer, start), 0.0)[()]

"""One device and its links, and the time of one all-to-all over them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

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


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Peak numbers of one device and its links, in SI units.

    Bandwidths count one direction.
    """

    name: str
    bf16_flops: float
    """FLOP/s of dense BF16 matrix products."""
    memory_bytes: float
    memory_bandwidth: float
    scale_up_domain: int
    """Number of devices that share scale-up links."""
    scale_up_bandwidth: float
    scale_up_latency: float
    scale_out_bandwidth: float
    scale_out_latency: float
    sources: dict[str, str] = dataclasses.field(default_factory=dict, compare=False)
    """Source of each number."""

    def __post_init__(self) -> None:
        for figure in SPECS:
            value = getattr(self, figure)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and math.isfinite(value) and value > 0):
                raise JobError(
                    f"hardware {self.name!r}: {figure} is {value!r}; it must be a number above 0"
                )

    def derated(self, *, compute_efficiency: float, network_efficiency: float) -> Hardware:
        """Return a copy with these shares of the peak FLOP/s and of the link bandwidths."""
        return dataclasses.replace(
            self,
            bf16_flops=self.bf16_flops * compute_efficiency,
            scale_up_bandwidth=self.scale_up_bandwidth * network_efficiency,
            scale_out_bandwidth=self.scale_out_bandwidth * network_efficiency,
        )

    def all_to_all_time(
        self,
        *,
        num_bytes: ArrayLike,
        ep_degree: ArrayLike,
        skew: ArrayLike = 1.0,
        starts_at_once: bool = False,
    ) -> Array:
        """Time of an all-to-all among ``ep_degree`` neighbouring ranks, in seconds.

        The ranks of an EP group are neighbours (torchtitan's innermost mesh axis), so
        ``min(EP, domain)`` of them share a scale-up domain. A rank reaches the peers in its
        domain over scale-up links, the others over scale-out links. Both kinds work at the same
        time, and the slower one determines the result.

        Args:
            num_bytes: bytes that a rank receives from all other ranks at balance.
            ep_degree: number of ranks in the group.
            skew: tokens of the busiest receiver over the mean.
            starts_at_once: a rank starts all its messages at once, instead of one after another.
        """
        degree = np.asarray(ep_degree, dtype=np.float64)
        peers = np.maximum(degree - 1, 1)
        near = (np.minimum(degree, self.scale_up_domain) - 1) / peers
        far = np.where(degree > 1, 1 - near, 0.0)
        seconds_per_byte = np.maximum(
            near / self.scale_up_bandwidth, far / self.scale_out_bandwidth
        )
        latency = near * self.scale_up_latency + far * self.scale_out_latency
        if starts_at_once:
            latency = np.where(far > 0, self.scale_out_latency, self.scale_up_latency) / peers
        return all_to_all_time(
            num_bytes=num_bytes,
            ep_degree=degree,
            bandwidth=1 / np.where(degree > 1, seconds_per_byte, 1.0),
            latency=latency,
            skew=skew,
        )


class Host(Hardware):
    """Machine without an accelerator, where torch runs attention and norms as several operators."""


SPECS = tuple(
    field.name for field in dataclasses.fields(Hardware) if field.name not in ("name", "sources")
)

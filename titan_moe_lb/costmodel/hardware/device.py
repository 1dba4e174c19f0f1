"""A device and its links."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from titan_moe_lb.costmodel.hardware.all_to_all import all_to_all_time
from titan_moe_lb.costmodel.loads.expert_load import Array
from titan_moe_lb.errors import JobError


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device and how it reaches the others. SI units; bandwidths in one direction."""

    name: str
    bf16_flops: float
    """FLOP/s of dense BF16 matrix products."""
    memory_bytes: float
    memory_bandwidth: float
    scale_up_domain: int
    """Devices that reach each other over the scale-up links."""
    scale_up_bandwidth: float
    scale_up_latency: float
    scale_out_bandwidth: float
    scale_out_latency: float
    sources: dict[str, str] = dataclasses.field(default_factory=dict, compare=False)
    """Source of each figure."""

    def __post_init__(self) -> None:
        for figure in SPECS:
            value = getattr(self, figure)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and math.isfinite(value) and value > 0):
                raise JobError(
                    f"hardware {self.name!r}: {figure} is {value!r}; it must be a number above 0"
                )

    def derated(self, *, compute_efficiency: float, network_efficiency: float) -> Hardware:
        """Copy of the device with the share of its peaks that a program reaches."""
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
        """Seconds of an all-to-all among ``ep_degree`` neighbouring ranks.

        Ranks of an EP group are neighbours (torchtitan's innermost mesh axis), so that
        ``min(EP, domain)`` of them share a domain. Of the EP - 1 peers those in the domain
        are reached over the scale-up links, the others over the scale-out ones; both work
        at the same time and the slower one decides.

        Args:
            num_bytes: bytes that a rank receives from all other ranks at balance.
            starts_at_once: the messages of a rank, rather than one after another.
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
    """A machine without an accelerator, where torch composes attention and norms of operators."""


SPECS = tuple(
    field.name for field in dataclasses.fields(Hardware) if field.name not in ("name", "sources")
)

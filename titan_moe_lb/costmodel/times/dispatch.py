"""Time of the dispatch and combine all-to-alls of a layer."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from titan_moe_lb.costmodel.hardware.all_to_all import all_to_all_time
from titan_moe_lb.costmodel.hardware.device import Hardware
from titan_moe_lb.costmodel.loads.expert_load import Array
from titan_moe_lb.costmodel.times.gemm import BF16_BYTES

Dispatcher = Literal["standard", "deepep", "low_latency"]


def exchange_time(
    dispatcher: Dispatcher,
    hardware: Hardware,
    *,
    tokens: float,
    num_experts: int,
    top_k: int,
    dim: int,
    ep_degree: int,
    reachable: float,
    neighbouring: bool,
    skew: Array,
) -> Array:
    """Time of one dispatch or combine all-to-all on the busiest rank, in seconds.

    - ``standard`` sends each of the K copies of a token.
    - ``deepep`` sends a token once to each of its nodes, and there once to each of its ranks.
      Scale-out and scale-up links work at the same time.
    - ``low_latency`` (DeepEP's kernels for serving) sends the copies of ``standard``, and starts
      the messages to all ranks at once.

    Args:
        dispatcher: kind of dispatcher.
        hardware: the device and its links.
        tokens: tokens that one rank routes.
        num_experts: E.
        top_k: K.
        dim: model dimension D.
        ep_degree: ranks of the group.
        reachable: share of the nodes that group-limited routing allows a token.
        neighbouring: a token selects consecutive experts, and so reaches few ranks.
        skew: tokens of the busiest receiver over the mean.
    """
    if dispatcher != "deepep":
        # At balance 1/EP of the K copies of a token stay on their rank.
        copies = top_k * (ep_degree - 1) / ep_degree
        return hardware.all_to_all_time(
            num_bytes=tokens * copies * dim * BF16_BYTES,
            ep_degree=ep_degree,
            skew=skew,
            starts_at_once=dispatcher == "low_latency",
        )
    near = min(ep_degree, hardware.scale_up_domain)
    nodes = max(1.0, ep_degree / hardware.scale_up_domain)

    def link_time(
        places: float, reachable: float, peers: float, bandwidth: float, latency: float
    ) -> Array:
        sent = places_of_a_token(places, num_experts, top_k, neighbouring, reachable)
        return all_to_all_time(
            num_bytes=tokens * sent * (1 - 1 / peers) * dim * BF16_BYTES,
            ep_degree=peers,
            bandwidth=bandwidth,
            latency=latency,
            # No node or rank receives a token twice.
            skew=np.minimum(skew, places / sent),
        )

    out = link_time(
        nodes, reachable, nodes, hardware.scale_out_bandwidth, hardware.scale_out_latency
    )
    up = link_time(ep_degree, 1.0, near, hardware.scale_up_bandwidth, hardware.scale_up_latency)
    return np.maximum(out, up)


def places_of_a_token(
    places: float, num_experts: int, top_k: int, neighbouring: bool, reachable: float = 1.0
) -> float:
    """Mean number of different ranks or nodes that hold the K experts of a token.

    Args:
        places: ranks or nodes over which the experts are split.
        num_experts: E.
        top_k: K.
        neighbouring: a token selects consecutive experts.
        reachable: share of the places that a token may reach.
    """
    if neighbouring:
        return _different_of_a_run(places, top_k, int(num_experts // places))
    return _different(max(1.0, places * reachable), top_k)


def _different_of_a_run(places: float, choices: int, experts: int) -> float:
    """Mean number of places that hold K consecutive experts, with ``experts`` in each place."""
    # A run starts at multiples of gcd(K, experts), at each offset in a place equally often.
    # The formula is the mean of 1 + (offset + K - 1) // experts over these offsets.
    return min(places, 1 + (choices - math.gcd(choices, experts)) / experts)


def _different(places: float, choices: int) -> float:
    """Mean number of different places among independent uniform choices."""
    return places * (1 - (1 - 1 / places) ** choices)

"""Time of the dispatch and combine all-to-alls of a layer."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from titan_moe_lb.costmodel.hardware.all_to_all import all_to_all_time
from titan_moe_lb.costmodel.hardware.device import Hardware
from titan_moe_lb.costmodel.hardware.roofline import BF16_BYTES
from titan_moe_lb.costmodel.loads.expert_load import Array

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
    """Seconds of one all-to-all, there or back, until the busiest rank has everything.

    ``standard`` sends each of the K copies of a token. ``deepep`` sends a token once to each
    node that it goes to, and there once to each rank, over both kinds of links at once.
    ``low_latency``, DeepEP's kernels for serving, sends what ``standard`` does, and starts the
    messages to all ranks at once.

    Args:
        tokens: of one rank.
        reachable: share of the nodes that a token may go to, by group-limited routing.
        neighbouring: a token takes experts that follow one another, and so goes to few places.
        skew: the busiest receiver over the mean.
    """
    if dispatcher != "deepep":
        # Of the K copies of each token, 1/EP stay on their rank at balance.
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
            # No place gets a token twice.
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
    """Expected number of different ranks or nodes that the K experts of a token are on.

    Args:
        reachable: share of the places that a token may go to.
    """
    if neighbouring:
        return _different_of_a_run(places, top_k, int(num_experts // places))
    return _different(max(1.0, places * reachable), top_k)


def _different_of_a_run(places: float, choices: int, experts: int) -> float:
    """Mean number of places of K experts that follow one another, with so many in each place."""
    # A run begins at any multiple of the common divisor, and ends in another place as often.
    return min(places, 1 + (choices - math.gcd(choices, experts)) / experts)


def _different(places: float, choices: int) -> float:
    """Expected number of different places among even choices."""
    return places * (1 - (1 - 1 / places) ** choices)

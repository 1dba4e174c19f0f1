"""Time of the dispatch and combine all-to-alls of a layer."""

from __future__ import annotations

import math

import numpy as np

from titan_moe_lb.costmodel.hardware.device import Hardware, all_to_all_time
from titan_moe_lb.costmodel.loads.expert_load import Array
from titan_moe_lb.costmodel.times.gemm import BF16_BYTES
from titan_moe_lb.costmodel.times.moe_layer import MoELayer, RankRole


def exchange_time(layer: MoELayer, role: RankRole, hardware: Hardware, skew: Array) -> Array:
    """Time of one dispatch or combine all-to-all on the busiest rank, in seconds.

    - ``standard`` sends each of the K copies of a token.
    - ``deepep`` sends a token once to each of its nodes, and there once to each of its ranks.
      Scale-out and scale-up links work at the same time.
    - ``low_latency`` (DeepEP's kernels for serving) sends the copies of ``standard``, and starts
      the messages to all ranks at once.

    ``skew`` is the tokens of the busiest receiver over the mean.
    """
    degree, token_bytes = role.ep_degree, layer.dim * BF16_BYTES
    if role.dispatcher != "deepep":
        # At balance 1/EP of the K copies of a token stay on their rank.
        copies = layer.top_k * (degree - 1) / degree
        return hardware.all_to_all_time(
            num_bytes=role.tokens_per_rank * copies * token_bytes,
            ep_degree=degree,
            skew=skew,
            starts_at_once=role.dispatcher == "low_latency",
        )

    def link_time(
        places: float, reachable: float, peers: float, bandwidth: float, latency: float
    ) -> Array:
        sent = places_of_a_token(layer, places, reachable)
        return all_to_all_time(
            num_bytes=role.tokens_per_rank * sent * (1 - 1 / peers) * token_bytes,
            ep_degree=peers,
            bandwidth=bandwidth,
            latency=latency,
            # No node or rank receives a token twice.
            skew=np.minimum(skew, places / sent),
        )

    near = min(degree, hardware.scale_up_domain)
    nodes = max(1.0, degree / hardware.scale_up_domain)
    reachable = layer.num_limited_groups / layer.num_groups
    out = link_time(
        nodes, reachable, nodes, hardware.scale_out_bandwidth, hardware.scale_out_latency
    )
    up = link_time(degree, 1.0, near, hardware.scale_up_bandwidth, hardware.scale_up_latency)
    return np.maximum(out, up)


def places_of_a_token(layer: MoELayer, places: float, reachable: float = 1.0) -> float:
    """Mean number of different ranks or nodes that hold the K experts of a token.

    Group-limited routing allows a token the share ``reachable`` of the places.
    """
    if layer.neighbouring_choices:
        # A run of K experts starts at multiples of gcd(K, experts of a place), at each offset in
        # a place equally often. This is the mean of 1 + (offset + K - 1) // experts over them.
        experts = int(layer.num_experts // places)
        return min(places, 1 + (layer.top_k - math.gcd(layer.top_k, experts)) / experts)
    # K independent uniform choices.
    allowed = max(1.0, places * reachable)
    return allowed * (1 - (1 - 1 / allowed) ** layer.top_k)

"""Time of one MoE layer: router, dispatch, experts, combine, shared experts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from titan_moe_lb.costmodel.hardware.device import Hardware
from titan_moe_lb.costmodel.loads.expert_load import (
    Array,
    ExpertLoad,
    active_share,
    expert_load,
    whole_rows,
)
from titan_moe_lb.costmodel.times.dispatch import exchange_time
from titan_moe_lb.costmodel.times.gemm import (
    BF16_BYTES,
    gemm_time,
    mlp_time,
)
from titan_moe_lb.costmodel.times.moe_layer import MoELayer, RankRole


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """Seconds of one layer's forward pass on the busiest rank, for one micro-batch."""

    router: Array
    dispatch: Array
    experts: Array
    movement: Array
    """Memory-bound work: sorting tokens by expert and back, the activation between the
    products, and the sum over a token's copies."""
    combine: Array
    shared_experts: Array

    @property
    def compute(self) -> Array:
        """Forward pass without the all-to-alls."""
        return self.router + self.experts + self.movement + self.shared_experts

    @property
    def forward(self) -> Array:
        """Forward pass with the all-to-alls."""
        return self.compute + self.dispatch + self.combine

    @property
    def backward(self) -> Array:
        """Backward pass: each all-to-all runs once in reverse, and compute takes twice as long.

        A product has one for the gradient of its input and one for the gradient of its weight.
        """
        return 2 * self.compute + self.dispatch + self.combine

    def recomputation(self, policy: str) -> Array:
        """Seconds of the work that activation checkpointing repeats before the backward.

        Full checkpointing repeats the whole forward. torchtitan's selective policy saves the
        results of the all-to-alls. It repeats the grouped products and every second other
        product.
        """
        if policy == "full":
            return self.forward
        if policy == "selective":
            return self.experts + self.movement + 0.5 * (self.router + self.shared_experts)
        return 0.0 * self.forward

    def total(self, policy: str = "none") -> Array:
        """Sum of forward, recomputation and backward."""
        return self.forward + self.recomputation(policy) + self.backward


def two_level_load(
    layer: MoELayer, role: RankRole, imbalance_factor: ArrayLike, num_hot_experts: ArrayLike = 1
) -> ExpertLoad:
    """Load of one micro-batch with W hot experts, the others even; see :func:`expert_load`."""
    return expert_load(
        num_experts=layer.num_experts,
        top_k=layer.top_k,
        num_tokens=role.tokens,
        imbalance_factor=imbalance_factor,
        num_hot_experts=num_hot_experts,
        ep_degree=role.ep_degree,
    )


def two_level_layer_time(
    layer: MoELayer, role: RankRole, hardware: Hardware, load: ExpertLoad
) -> LayerTime:
    """Time under the two-level load of the layer."""
    hidden_dim = layer.hidden_dim / role.expert_shards
    hot, hot_rows, others, other_rows = load.gemms()
    hot_seconds = hot * mlp_time(hot_rows, layer.dim, hidden_dim, hardware)
    other_seconds = others * mlp_time(other_rows, layer.dim, hidden_dim, hardware)
    return _layer_time(
        layer, role, hardware, experts=hot_seconds + other_seconds, skew=load.receiver_skew
    )


def measured_layer_time(
    layer: MoELayer, role: RankRole, hardware: Hardware, device_experts_dn: np.ndarray
) -> LayerTime:
    """Time under measured loads.

    ``device_experts_dn`` has the tokens of each of the n experts of each of the EP devices,
    ``(..., EP, n)``. They add up to ``role.tokens`` x top_k. Leading dimensions, such as
    micro-batches, become the shape of the times.
    """
    rows_dn = whole_rows(device_experts_dn)
    return _uneven_layer_time(layer, role, hardware, device_experts_dn, rows_dn, 1.0)


def served_layer_time(
    layer: MoELayer, role: RankRole, hardware: Hardware, chosen_dn: np.ndarray
) -> tuple[LayerTime, Array]:
    """Time of a layer with so few tokens that some experts have no work.

    The weights of an expert without work are not read. ``chosen_dn`` is the probability that a
    token chooses the expert in each of the n slots of each of the EP devices, ``(..., EP, n)``.
    They add up to top_k.

    Returns:
        Time of the layer, and the mean number of experts with work on the device that has most
        of them.
    """
    active_dn = active_share(chosen_dn, role.tokens)
    rows_dn = role.tokens * chosen_dn / np.maximum(active_dn, np.finfo(float).tiny)
    time = _uneven_layer_time(layer, role, hardware, chosen_dn, rows_dn, active_dn)
    return time, active_dn.sum(axis=-1).max(axis=-1)


def _uneven_layer_time(
    layer: MoELayer,
    role: RankRole,
    hardware: Hardware,
    load_dn: np.ndarray,
    rows_dn: np.ndarray,
    active_dn: ArrayLike,
) -> LayerTime:
    """Time of a layer in which every expert has its own load.

    ``load_dn`` are tokens in any unit ``(..., EP, n)``; ``rows_dn`` those of an expert that has
    work, which ``active_dn`` is the probability of.
    """
    hidden_dim = layer.hidden_dim / role.expert_shards
    seconds_dn = active_dn * mlp_time(rows_dn, layer.dim, hidden_dim, hardware)
    load_d = load_dn.sum(axis=-1)
    skew = load_d.max(axis=-1) / load_d.mean(axis=-1)
    experts = seconds_dn.sum(axis=-1).max(axis=-1)
    return _layer_time(layer, role, hardware, experts=experts, skew=skew)


def _layer_time(
    layer: MoELayer, role: RankRole, hardware: Hardware, *, experts: Array, skew: Array
) -> LayerTime:
    exchange = exchange_time(layer, role, hardware, skew)
    shared = (
        mlp_time(
            role.tokens_per_rank, layer.dim, layer.shared_hidden_dim / role.expert_shards, hardware
        )
        if layer.shared_hidden_dim
        else 0.0
    )
    return LayerTime(
        router=gemm_time(role.tokens_per_rank, layer.dim, layer.num_experts, hardware),
        dispatch=exchange,
        experts=experts,
        movement=_moved_bytes(layer, role, skew) / hardware.memory_bandwidth,
        combine=exchange,
        shared_experts=shared,
    )


def _moved_bytes(layer: MoELayer, role: RankRole, skew: Array) -> Array:
    """Bytes that the busiest rank reads and writes in a forward, with fused operations.

    The activation reads two values and writes one for each received token. Biases are written
    out for each token before they are added. The other work, in reads and writes of D values:

    - standard: sort sent tokens by rank (2), and weight and sum them in float32 when they are
      back (3). Sort received tokens by expert (2) and back (2).
    - without EP: sort tokens by expert (2), weight and sum them (3).
    - DeepEP: sort received tokens by expert (2), weight and sum them (3).
    - low latency: received tokens arrive sorted by expert, and are weighted (2).
    """
    dispatcher = role.dispatcher if role.exchanges else "local"
    received, returned = {
        "local": (0, 5),
        "standard": (4, 5),
        "deepep": (5, 0),
        "low_latency": (2, 0),
    }[dispatcher]
    sent = role.tokens_per_rank * layer.top_k
    hidden_dim = layer.hidden_dim / role.expert_shards
    of_received = received * layer.dim + 3 * hidden_dim
    if layer.expert_biases:
        of_received += 4 * (layer.dim + 2 * hidden_dim)
    return BF16_BYTES * sent * (skew * of_received + returned * layer.dim)

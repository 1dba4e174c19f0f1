"""The time of one MoE layer: router, dispatch, experts, combine, shared experts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from titan_moe_lb.costmodel.hardware.device import Hardware
from titan_moe_lb.costmodel.hardware.roofline import (
    BF16_BYTES,
    expert_forward_time,
    gemm_time,
    mlp_time,
)
from titan_moe_lb.costmodel.loads.expert_load import (
    WORST,
    Array,
    ExpertLoad,
    active_share,
    expert_load,
    whole_rows,
)
from titan_moe_lb.costmodel.times.dispatch import Dispatcher, exchange_time


@dataclass(frozen=True, kw_only=True)
class MoELayer:
    """The sizes of one MoE layer."""

    num_experts: int
    top_k: int
    dim: int
    hidden_dim: int
    shared_hidden_dim: int = 0
    """Hidden size of the shared experts together; 0 without any."""
    num_groups: int = 1
    """Expert groups of group-limited routing."""
    num_limited_groups: int = 1
    """Groups that a token may go to."""
    expert_biases: bool = False
    """Each expert adds biases to what its products give."""
    neighbouring_choices: bool = False
    """A token takes experts that follow one another, as torchtitan's forced balance deals them."""

    @property
    def parameters_per_expert(self) -> int:
        return 3 * self.dim * self.hidden_dim


@dataclass(frozen=True, kw_only=True)
class RankRole:
    """The share of a rank in an MoE layer."""

    tokens_per_rank: int
    """Tokens that the rank routes in one micro-batch."""
    ep_degree: int
    expert_shards: int = 1
    """Tensor-parallel ranks that split the hidden size of each expert; 1 with EP."""
    dispatcher: Dispatcher = "standard"

    @property
    def exchanges(self) -> bool:
        """Tokens go to other ranks. Without EP the local dispatcher is planned, whichever is
        asked for: of torchtitan's only the standard one falls back to it."""
        return self.ep_degree > 1

    @property
    def tokens(self) -> int:
        """Tokens that the EP group routes together."""
        return self.tokens_per_rank * self.ep_degree


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """Seconds of the forward pass of one layer on the busiest rank, one micro-batch."""

    router: Array
    dispatch: Array
    experts: Array
    movement: Array
    """Moving tokens and working on single values: the order of the experts and back,
    the activation between the products, the sum over the copies."""
    combine: Array
    shared_experts: Array

    @property
    def compute(self) -> Array:
        return self.router + self.experts + self.movement + self.shared_experts

    @property
    def forward(self) -> Array:
        return self.compute + self.dispatch + self.combine

    @property
    def backward(self) -> Array:
        """Each product twice, each all-to-all once in the other direction."""
        return 2 * self.compute + self.dispatch + self.combine

    def recomputation(self, policy: str) -> Array:
        """Seconds that activation checkpointing computes again before the backward.

        Full checkpointing repeats the whole forward. torchtitan's selective policy keeps
        the results of the all-to-alls and repeats the grouped products and every second
        other one.
        """
        if policy == "full":
            return self.forward
        if policy == "selective":
            return self.experts + self.movement + 0.5 * (self.router + self.shared_experts)
        return 0.0 * self.forward

    def total(self, policy: str = "none") -> Array:
        """Forward, recomputation and backward."""
        return self.forward + self.recomputation(policy) + self.backward


def moe_layer_time(
    layer: MoELayer,
    role: RankRole,
    hardware: Hardware,
    *,
    imbalance_factor: ArrayLike = WORST,
    num_hot_experts: ArrayLike = 1,
) -> LayerTime:
    """The time under the two-level load: W hot experts, the others even.

    Raises:
        JobError: the imbalance outside [1, E/K], W outside [1, K].
    """
    load = layer_load(layer, role, imbalance_factor, num_hot_experts)
    hidden_dim = layer.hidden_dim / role.expert_shards
    experts = expert_forward_time(load, layer.dim, hidden_dim, hardware)
    return _layer_time(layer, role, hardware, experts=experts, skew=load.receiver_skew)


def layer_load(
    layer: MoELayer, role: RankRole, imbalance_factor: ArrayLike, num_hot_experts: ArrayLike
) -> ExpertLoad:
    """The two-level load of one micro-batch. Errors: as :func:`moe_layer_time`."""
    return expert_load(
        num_experts=layer.num_experts,
        top_k=layer.top_k,
        num_tokens=role.tokens,
        imbalance_factor=imbalance_factor,
        num_hot_experts=num_hot_experts,
        ep_degree=role.ep_degree,
    )


def measured_layer_time(
    layer: MoELayer, role: RankRole, hardware: Hardware, device_experts_dn: np.ndarray
) -> LayerTime:
    """The time under measured loads.

    Args:
        device_experts_dn: tokens of each of the n experts of each of the EP devices,
            ``(..., EP, n)``, of ``role.tokens`` tokens in all. Leading dimensions
            (steps) give arrays of that shape.
    """
    rows_dn = whole_rows(device_experts_dn)
    return _uneven_layer_time(layer, role, hardware, device_experts_dn, rows_dn, 1.0)


def served_layer_time(
    layer: MoELayer, role: RankRole, hardware: Hardware, chosen_dn: np.ndarray
) -> tuple[LayerTime, Array]:
    """The time where tokens are so few that some experts have no work, and are not read.

    Args:
        chosen_dn: the probability that a token chooses the expert in each of the n slots of
            each of the EP devices, ``(..., EP, n)``. They add up to top_k.

    Returns:
        The time, and the expected experts with work on the device that has most of them.
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
    """The time where each expert of each device has a load of its own.

    Args:
        load_dn: tokens of each expert, in any unit.
        rows_dn: tokens of an expert that has work.
        active_dn: the probability that it has.
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
    tokens, degree = role.tokens_per_rank, role.ep_degree
    exchange = exchange_time(
        role.dispatcher,
        hardware,
        tokens=tokens,
        num_experts=layer.num_experts,
        top_k=layer.top_k,
        dim=layer.dim,
        ep_degree=degree,
        reachable=layer.num_limited_groups / layer.num_groups,
        neighbouring=layer.neighbouring_choices,
        skew=skew,
    )
    shared = (
        mlp_time(tokens, layer.dim, layer.shared_hidden_dim / role.expert_shards, hardware)
        if layer.shared_hidden_dim
        else 0.0
    )
    return LayerTime(
        router=gemm_time(tokens, layer.dim, layer.num_experts, hardware),
        dispatch=exchange,
        experts=experts,
        movement=_moved_bytes(layer, role, skew) / hardware.memory_bandwidth,
        combine=exchange,
        shared_experts=shared,
    )


def _moved_bytes(layer: MoELayer, role: RankRole, skew: Array) -> Array:
    """Read and written by the busiest rank in a forward, each operation fused into one.

    Of what it receives: the activation (two in, one out). Biases are written out for each token
    before they are added. Of the rest, in values of D:

    - standard: what it sends into the order of the ranks (2), weighted and summed in float32 when
      it is back (3); what it receives into the order of the experts (2) and back (2).
    - without EP: into the order of the experts (2), weighted and summed (3).
    - DeepEP: what it receives into the order of the experts (2), weighted and summed (3).
    - low latency: what it receives comes in the order of the experts, and is weighted (2).
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

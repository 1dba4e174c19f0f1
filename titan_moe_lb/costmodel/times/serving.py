"""Step time and capacity of a deployment at one expert-parallel degree.

A deployment is one expert-parallel group. Every rank has its own sequences and all weights but
the routed experts, which the ranks divide among them. All ranks run each step together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from titan_moe_lb.costmodel.hardware.device import Hardware
from titan_moe_lb.costmodel.times.gemm import BF16_BYTES, gemm_time, turning_rows
from titan_moe_lb.costmodel.times.layer import served_layer_time
from titan_moe_lb.costmodel.times.moe_layer import Dispatcher, RankRole
from titan_moe_lb.costmodel.times.placed_experts import placed_experts
from titan_moe_lb.costmodel.times.served_load import ServedLoad
from titan_moe_lb.costmodel.times.served_model import ServedModel
from titan_moe_lb.traces.expert_order import tokens_of_experts


@dataclass(frozen=True, kw_only=True)
class ServedStep:
    """Time and memory of one step of a rank."""

    cache_seconds: float
    """Attention over the KV caches of all layers."""
    linear_seconds: float
    """Linear layers outside MoE layers, and the logits."""
    step_seconds: float
    """The whole step, MoE layers included."""
    tokens_per_second: float
    """Throughput of one rank."""
    memory_bytes: float
    """Bytes of the weights and of the caches of the step's sequences or prompts."""
    fits: bool


@dataclass(frozen=True, kw_only=True)
class ServedRow:
    """Steps with one number of tokens on every rank, under one load."""

    load: str
    """Name of the load: imbalance, sigma or placement."""
    tokens: int
    """Tokens of a rank in a step."""
    active_experts: float
    """Experts of a layer with work, on the rank that has most of them; mean over layers."""
    experts_seconds: float
    """Router, experts and shared experts of all MoE layers, on the busiest rank."""
    exchange_seconds: float
    """Dispatch and combine of all MoE layers."""
    decode: ServedStep
    """Decode step: one new token for each of as many sequences."""
    prefill: ServedStep
    """Prefill step: the tokens are prompt tokens."""


@dataclass(frozen=True, kw_only=True)
class ServedDegree:
    """Plan of a deployment at one expert-parallel degree."""

    ep_degree: int
    weight_bytes: float
    """Bytes of the weights of a rank, without copies of experts."""
    most_sequences: int
    """Largest number of sequences on a rank whose caches fit beside the weights."""
    turning_tokens: float | None
    """Tokens of a rank above which, at balance, the experts' arithmetic takes longer than
    reading their weights; None if it never does."""
    rows: tuple[ServedRow, ...]


def serve_degree(
    model: ServedModel,
    hardware: Hardware,
    *,
    ep_degree: int,
    loads: Sequence[ServedLoad],
    tokens: Sequence[int],
    context: int,
    usable_bytes: float,
    up_to_room: bool = False,
    dispatcher: Dispatcher,
) -> ServedDegree:
    """Plan a deployment at one expert-parallel degree.

    Args:
        model: sizes of the model.
        hardware: the derated device.
        ep_degree: ranks of the group.
        loads: loads and placements, each of which gets its own rows.
        tokens: numbers of tokens of a rank in one step, one row for each.
        context: tokens of a sequence, the prompt included.
        usable_bytes: usable memory of a device, in bytes.
        up_to_room: add a row with as many tokens as sequences fit.
        dispatcher: kind of dispatcher.

    Raises:
        JobError: the devices do not divide the experts and their copies.
    """
    caches = [layer.cache for layer in model.layers]

    def row(number: int, load: ServedLoad, chosen: dict[int, np.ndarray]) -> ServedRow:
        role = RankRole(tokens_per_rank=number, ep_degree=ep_degree, dispatcher=dispatcher)
        experts, exchange = 0.0, 0.0
        active: list[float] = []
        for layer in model.expert_bytes:
            time, at_work = served_layer_time(
                model.moe_layers[layer], role, hardware, chosen[layer]
            )
            experts += float(np.mean(time.compute))
            exchange += float(np.mean(time.dispatch + time.combine))
            active.append(float(np.mean(at_work)))
        weights = model.weight_bytes(ep_degree, load.redundant_experts)

        def step(cache_seconds: float, sequences: float) -> ServedStep:
            linear = _linear_seconds(model, number, sequences, hardware)
            seconds = experts + exchange + cache_seconds + linear
            memory = weights + sequences * model.cache_bytes(context)
            return ServedStep(
                cache_seconds=cache_seconds,
                linear_seconds=linear,
                step_seconds=seconds,
                tokens_per_second=number / seconds,
                memory_bytes=memory,
                fits=memory <= usable_bytes,
            )

        decode = sum(cache.decode_seconds(number, context, hardware) for cache in caches)
        prefill = sum(cache.prefill_seconds(number, context, hardware) for cache in caches)
        return ServedRow(
            load=load.name,
            tokens=number,
            active_experts=float(np.mean(active)),
            experts_seconds=experts,
            exchange_seconds=exchange,
            decode=step(decode, number),
            prefill=step(prefill, max(1.0, number / context)),
        )

    weights = model.weight_bytes(ep_degree)
    layer = next(iter(model.moe_layers.values()))
    most = max(0, int((usable_bytes - weights) / model.cache_bytes(context)))
    if up_to_room and most:
        tokens = sorted({*tokens, most})
    even = turning_rows(layer.dim, layer.hidden_dim, hardware)
    return ServedDegree(
        ep_degree=ep_degree,
        weight_bytes=weights,
        most_sequences=most,
        turning_tokens=even and even * layer.num_experts / layer.top_k / ep_degree,
        rows=tuple(
            row(number, load, chosen)
            for load in loads
            for chosen in [_chosen(model, hardware, ep_degree, load)]
            for number in tokens
        ),
    )


def _chosen(
    model: ServedModel, hardware: Hardware, ep_degree: int, load: ServedLoad
) -> dict[int, np.ndarray]:
    """Probability that a token chooses each slot ``(N, EP, n)``, by number of the MoE layer."""
    placed = placed_experts(
        load.placement,
        model.moe_layers,
        load.counts_NME.sum(axis=0),
        ep_degree=ep_degree,
        hardware=hardware,
        expert_groups=load.expert_groups,
        redundant_experts=load.redundant_experts,
    )
    return {
        number: tokens_of_experts(load.counts_NME[:, row], placed[row], layer.top_k)
        for row, (number, layer) in enumerate(model.moe_layers.items())
    }


def _linear_seconds(model: ServedModel, tokens: float, logits: float, hardware: Hardware) -> float:
    """Roofline time of the linear layers and the head, in seconds.

    The operations between the layers write and read inputs and outputs once more. ``logits`` is
    the number of tokens whose logits are computed, one for each sequence.
    """
    products = 0.0
    values = 0
    for layer in model.layers:
        for inputs, outputs in layer.linears:
            products += float(gemm_time(tokens, inputs, outputs, hardware))
            values += inputs + outputs
    products += float(gemm_time(logits, *model.head, hardware))
    return products + 2 * BF16_BYTES * tokens * values / hardware.memory_bandwidth

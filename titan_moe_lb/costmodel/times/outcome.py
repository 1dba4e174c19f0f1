"""One job at one expert-parallel degree on one device, under a load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from titan_moe_lb.costmodel.hardware.device import Hardware
from titan_moe_lb.costmodel.hardware.roofline import BF16_BYTES
from titan_moe_lb.costmodel.times.activation import activation_peak
from titan_moe_lb.costmodel.times.job import JobModel
from titan_moe_lb.costmodel.times.layer import (
    LayerTime,
    MoELayer,
    RankRole,
    layer_load,
    measured_layer_time,
    moe_layer_time,
)
from titan_moe_lb.costmodel.times.step import step_time
from titan_moe_lb.parallel.schedules import stages_of
from titan_moe_lb.traces.expert_order import tokens_of_experts


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A job under one load. Seconds and bytes of the busiest rank."""

    compute_seconds: float
    """Router, experts and shared experts of one MoE layer, forward, one micro-batch."""
    dispatch_seconds: float
    combine_seconds: float
    layer_seconds: float
    """The layer with its recomputation and backward; the mean over layers and micro-batches."""
    layer_slowdown: float
    """Against balance."""
    worst_layer_slowdown: float
    """Slowdown of the slowest layer, mean over its micro-batches."""
    step_seconds: float
    step_slowdown: float
    hot_expert_tokens: float
    """Tokens of the most loaded expert in one micro-batch."""
    busiest_rank_tokens: float
    memory_bytes: float
    memory_rank: int
    """The rank that needs most memory."""
    fits: bool


@dataclass(frozen=True)
class LayerLoad:
    """The load of one MoE layer under N micro-batches: numbers or arrays of that length."""

    time: LayerTime
    hot_expert_tokens: float
    received_NR: np.ndarray
    """Tokens that each rank of the EP group receives, or one number for all, ``(N, R)``."""


Loads = dict[int, LayerLoad]
"""Loads by MoE layer, all under the same micro-batches."""


class View:
    """One job at one degree on one device."""

    def __init__(
        self, job: JobModel, hardware: Hardware, usable_bytes: float, num_hot_experts: int
    ) -> None:
        self.job = job
        self.hardware = hardware
        self.usable_bytes = usable_bytes
        self.num_hot_experts = num_hot_experts
        self.role = RankRole(
            tokens_per_rank=job.tokens_per_rank,
            ep_degree=job.ep_degree,
            expert_shards=job.tp_degree if job.ep_degree == 1 else 1,
            dispatcher=job.dispatcher,
        )
        self.worst = min(layer.num_experts / layer.top_k for layer in job.moe_layers.values())

    def two_level(self, factor: float) -> Loads:
        """W hot experts in every layer and micro-batch, on a rank that is hot in all of them."""
        hot = self.num_hot_experts

        def loaded(layer: MoELayer) -> LayerLoad:
            time = moe_layer_time(
                layer, self.role, self.hardware, imbalance_factor=factor, num_hot_experts=hot
            )
            load = layer_load(layer, self.role, factor, hot)
            received_NR = np.full((1, 1), load.tokens_on_device)
            return LayerLoad(time, float(load.hot_tokens), received_NR)

        layers = self.job.moe_layers
        known = {layer: loaded(layer) for layer in set(layers.values())}
        return {number: known[layer] for number, layer in layers.items()}

    def measured(self, counts_NME: np.ndarray, placed: Sequence[np.ndarray]) -> Loads:
        """Loads of N micro-batches, scaled to the job's tokens.

        Args:
            counts_NME: tokens of each expert of each MoE layer.
            placed: of each layer the expert ids in the slots of each device ``(R, n)``.
        """
        loads: Loads = {}
        for row, (number, layer) in enumerate(self.job.moe_layers.items()):
            tokens_NRn = tokens_of_experts(
                counts_NME[:, row], placed[row], self.role.tokens * layer.top_k
            )
            time = measured_layer_time(layer, self.role, self.hardware, tokens_NRn)
            loads[number] = LayerLoad(time, float(tokens_NRn.max()), tokens_NRn.sum(axis=-1))
        return loads

    def memory(self, received: Mapping[int, np.ndarray], copies: int = 0) -> tuple[float, int]:
        """Bytes on the rank that needs most, and its pipeline rank.

        Args:
            received: tokens that each rank of the EP group receives ``(N, R)``, by MoE layer.
            copies: of experts on each rank in each layer, besides its own.
        """
        accumulates = self.job.accumulation_steps > 1
        needs = {
            position: state.peak_bytes(
                activation_peak(self.job, self.role, position, received), accumulates
            )
            + copies * self._copy_bytes(position)
            for position, state in self.job.states.items()
        }
        position = max(needs, key=lambda key: needs[key])
        return needs[position], position

    def memory_at(self, factor: float) -> tuple[float, int]:
        """Bytes and pipeline rank under the two-level load of that imbalance."""
        return self.memory(_received(self.two_level(factor)))

    def _copy_bytes(self, position: int) -> float:
        """Weights and gradients in BF16; the optimizer's state stays with the first copy."""
        layers = [
            self.job.moe_layers[number]
            for stage in stages_of(self.job.schedule[position])
            for number in self.job.stages[stage].moe_layers
        ]
        return 2 * BF16_BYTES * sum(layer.parameters_per_expert for layer in layers)

    def outcome(self, loads: Loads, balance: Outcome | None = None, copies: int = 0) -> Outcome:
        """Means over the MoE layers and micro-batches, the step, and the memory.

        Args:
            balance: what slowdowns are against; None for balance itself.
        """
        times = {number: load.time for number, load in loads.items()}
        layers = [float(np.mean(time.total(self.job.checkpointing))) for time in times.values()]
        num_loads = len(next(iter(loads.values())).received_NR)
        step = step_time(self.job, self.hardware, times, num_loads)
        memory, position = self.memory(_received(loads), copies)
        layer = float(np.mean(layers))

        def mean(part: str) -> float:
            return float(np.mean([np.mean(getattr(time, part)) for time in times.values()]))

        return Outcome(
            compute_seconds=mean("compute"),
            dispatch_seconds=mean("dispatch"),
            combine_seconds=mean("combine"),
            layer_seconds=layer,
            layer_slowdown=layer / balance.layer_seconds if balance else 1.0,
            worst_layer_slowdown=max(layers) / balance.layer_seconds if balance else 1.0,
            step_seconds=step,
            step_slowdown=step / balance.step_seconds if balance else 1.0,
            hot_expert_tokens=max(load.hot_expert_tokens for load in loads.values()),
            busiest_rank_tokens=max(float(load.received_NR.max()) for load in loads.values()),
            memory_bytes=memory,
            memory_rank=self.job.states[position].rank,
            fits=memory <= self.usable_bytes,
        )


def _received(loads: Loads) -> dict[int, np.ndarray]:
    return {number: load.received_NR for number, load in loads.items()}

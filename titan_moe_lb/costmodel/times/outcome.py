"""Step time and memory of a job at one expert-parallel degree, under one load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from titan_moe_lb.costmodel.hardware.device import Hardware
from titan_moe_lb.costmodel.times.activation import activation_peak
from titan_moe_lb.costmodel.times.gemm import BF16_BYTES
from titan_moe_lb.costmodel.times.job import JobModel
from titan_moe_lb.costmodel.times.layer import (
    LayerTime,
    measured_layer_time,
    two_level_layer_time,
    two_level_load,
)
from titan_moe_lb.costmodel.times.moe_layer import MoELayer, RankRole
from titan_moe_lb.costmodel.times.step import step_time
from titan_moe_lb.parallel.schedules import stages_of
from titan_moe_lb.traces.expert_order import tokens_of_experts


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Seconds and bytes of the busiest rank of a job, under one load."""

    compute_seconds: float
    """Forward of one MoE layer without all-to-alls, for one micro-batch; mean over layers."""
    dispatch_seconds: float
    combine_seconds: float
    layer_seconds: float
    """Forward, recomputation and backward of one MoE layer; mean over layers and
    micro-batches."""
    layer_slowdown: float
    """``layer_seconds`` over its value at balance."""
    worst_layer_slowdown: float
    """Seconds of the slowest layer, mean over its micro-batches, over ``layer_seconds`` at
    balance."""
    step_seconds: float
    step_slowdown: float
    hot_expert_tokens: float
    """Largest number of tokens of an expert in any layer and micro-batch."""
    peak_expert_load: float
    """``hot_expert_tokens`` over the balanced tokens of an expert."""
    busiest_rank_tokens: float
    """Largest number of tokens of a rank in any layer and micro-batch; a token has top_k copies."""
    mean_overload: float
    """Tokens of the busiest rank over the balanced ones; mean over layers and micro-batches."""
    peak_overload: float
    """The largest of these numbers, instead of their mean."""
    memory_bytes: float
    memory_rank: int
    """Global rank that needs most memory."""
    fits: bool


@dataclass(frozen=True)
class LayerLoad:
    """Load of one MoE layer in N micro-batches. Its times are numbers or arrays ``(N,)``."""

    time: LayerTime
    hot_expert_tokens: float
    received_NR: np.ndarray
    """Tokens that each rank of the EP group receives ``(N, R)``; R = 1 for one number for all."""


Loads = dict[int, LayerLoad]
"""Loads by number of the MoE layer, all in the same micro-batches."""


class View:
    """Evaluation of one job at one expert-parallel degree on one device."""

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
        """Build the load of W hot experts in every layer, all of them on the same rank."""

        def loaded(layer: MoELayer) -> LayerLoad:
            load = two_level_load(layer, self.role, factor, self.num_hot_experts)
            time = two_level_layer_time(layer, self.role, self.hardware, load)
            received_NR = np.full((1, 1), load.tokens_on_device)
            return LayerLoad(time, float(load.hot_tokens), received_NR)

        layers = self.job.moe_layers
        known = {layer: loaded(layer) for layer in set(layers.values())}
        return {number: known[layer] for number, layer in layers.items()}

    def measured(self, counts_NME: np.ndarray, placed: Sequence[np.ndarray]) -> Loads:
        """Build the loads of N micro-batches, scaled to the job's tokens.

        ``placed`` has the expert ids in the slots of each device ``(R, n)``, for each layer.
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
        """Find the rank that needs most memory.

        ``received`` has the tokens of each rank of the EP group ``(N, R)``, by number of the MoE
        layer; ``copies`` are further copies of experts on each rank, in each layer.

        Returns:
            Bytes of that rank, and its pipeline rank.
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
        """Find the rank that needs most memory under the two-level load of this imbalance."""
        return self.memory(_received(self.two_level(factor)))

    def _copy_bytes(self, position: int) -> float:
        """Bytes of one further expert in each layer: weights and gradients in BF16.

        The optimizer state stays with the first copy.
        """
        layers = [
            self.job.moe_layers[number]
            for stage in stages_of(self.job.schedule[position])
            for number in self.job.stages[stage].moe_layers
        ]
        return 2 * BF16_BYTES * sum(layer.parameters_per_expert for layer in layers)

    def outcome(self, loads: Loads, balance: Outcome | None = None, copies: int = 0) -> Outcome:
        """Compute means over MoE layers and micro-batches, step time and memory.

        Slowdowns compare with ``balance``, which is None for balance itself.
        """
        times = {number: load.time for number, load in loads.items()}
        layers = [float(np.mean(time.total(self.job.checkpointing))) for time in times.values()]
        num_loads = len(next(iter(loads.values())).received_NR)
        step = step_time(self.job, self.hardware, times, num_loads)
        memory, position = self.memory(_received(loads), copies)
        layer = float(np.mean(layers))

        balanced = {
            number: self.role.tokens_per_rank * self.job.moe_layers[number].top_k
            for number in loads
        }
        overload = np.stack(
            [load.received_NR.max(axis=1) / balanced[number] for number, load in loads.items()]
        )

        def mean(part: str) -> float:
            return float(np.mean([np.mean(getattr(time, part)) for time in times.values()]))

        def expert_load(number: int) -> float:
            tokens = balanced[number] * self.role.ep_degree
            experts = self.job.moe_layers[number].num_experts
            return loads[number].hot_expert_tokens * experts / tokens

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
            peak_expert_load=max(map(expert_load, loads)),
            busiest_rank_tokens=max(float(load.received_NR.max()) for load in loads.values()),
            mean_overload=float(overload.mean()),
            peak_overload=float(overload.max()),
            memory_bytes=memory,
            memory_rank=self.job.states[position].rank,
            fits=memory <= self.usable_bytes,
        )


def _received(loads: Loads) -> dict[int, np.ndarray]:
    return {number: load.received_NR for number, load in loads.items()}

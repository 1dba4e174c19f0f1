"""The answers: for each expert-parallel degree and imbalance, how slow and how much memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from titan_moe_lb.costmodel.activation import activation_peak, largest_that_fits
from titan_moe_lb.costmodel.hardware import Hardware
from titan_moe_lb.costmodel.job import JobModel
from titan_moe_lb.costmodel.layer import (
    LayerTime,
    Placement,
    layer_load,
    measured_layer_time,
    moe_layer_time,
)
from titan_moe_lb.costmodel.load import WORST
from titan_moe_lb.costmodel.step import step_time
from titan_moe_lb.traces.placement import contiguous, greedy, tokens_of_experts

CURVE_POINTS = 17


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A job under one imbalance. Seconds and bytes of the busiest rank."""

    compute_seconds: float
    """Router, experts and shared experts of one MoE layer, forward, one micro-batch."""
    dispatch_seconds: float
    combine_seconds: float
    layer_seconds: float
    """The layer with its recomputation and backward; the mean over the MoE layers."""
    layer_slowdown: float
    """Against balance."""
    step_seconds: float
    step_slowdown: float
    hot_expert_tokens: float
    """Tokens of the most loaded expert in one micro-batch."""
    busiest_rank_tokens: float
    memory_bytes: float
    memory_rank: int
    """The rank that needs most memory."""
    fits: bool


@dataclass(frozen=True, kw_only=True)
class AnalyticRow:
    """One imbalance of the two-level load."""

    imbalance_factor: float
    outcome: Outcome


@dataclass(frozen=True, kw_only=True)
class MeasuredRow:
    """The load of a recorded run: the first and the last steps, under one placement."""

    placement: str
    """"contiguous", as torchtitan places experts, or "greedy"."""
    first: Outcome
    last: Outcome


@dataclass(frozen=True, kw_only=True)
class DegreePlan:
    """One expert-parallel degree."""

    ep_degree: int
    tokens_per_rank: int
    state_bytes: int
    """Parameters, gradients, optimizer state and what FSDP gathers, on the rank that
    needs most memory at balance."""
    rows: tuple[AnalyticRow, ...]
    largest_imbalance_that_fits: float | None
    curve: tuple[AnalyticRow, ...]
    """From balance to the worst case, evenly on a logarithmic scale."""
    measured: tuple[MeasuredRow, ...] = ()


def plan_degree(
    job: JobModel,
    hardware: Hardware,
    imbalance_factors: Sequence[float],
    *,
    num_hot_experts: int,
    usable_bytes: float,
    first_counts_ME: np.ndarray | None = None,
    last_counts_ME: np.ndarray | None = None,
) -> DegreePlan:
    """Plan one expert-parallel degree.

    Args:
        imbalance_factors: each in [1, E/K], or -1 for E/K.
        num_hot_experts: W.
        usable_bytes: of a device's memory.
        first_counts_ME, last_counts_ME: measured tokens per expert of the MoE layers in
            order ``(M, E)``, at the beginning and at the end of a run.

    Raises:
        JobError: an imbalance or W outside its range.
    """
    view = _View(job, hardware, usable_bytes, num_hot_experts)
    balance = view.outcome(*view.two_level(1.0), None)

    def row(given: float) -> AnalyticRow:
        return AnalyticRow(
            imbalance_factor=view.worst if given == WORST else given,
            outcome=view.outcome(*view.two_level(given), balance),
        )

    largest = largest_that_fits(
        lambda factor: view.memory(view.two_level(factor)[1])[0] <= usable_bytes, view.worst
    )
    measured = []
    if first_counts_ME is not None and last_counts_ME is not None:
        for name in ("contiguous", "greedy"):
            first, last = (
                view.outcome(*view.measured(counts, name, last_counts_ME), balance)
                for counts in (first_counts_ME, last_counts_ME)
            )
            measured.append(MeasuredRow(placement=name, first=first, last=last))
    position = view.memory(view.two_level(1.0)[1])[1]
    return DegreePlan(
        ep_degree=job.ep_degree,
        tokens_per_rank=job.tokens_per_rank,
        state_bytes=job.states[position].total_bytes,
        rows=tuple(row(given) for given in imbalance_factors),
        largest_imbalance_that_fits=largest,
        curve=tuple(row(float(x)) for x in np.geomspace(1.0, view.worst, CURVE_POINTS)),
        measured=tuple(measured),
    )


def heaviest_pipeline_ranks(job: JobModel, hardware: Hardware, num_hot_experts: int) -> list[int]:
    """Where memory is largest at balance and at worst: what other degrees need to build."""
    view = _View(job, hardware, hardware.memory_bytes, num_hot_experts)
    return sorted({view.memory(view.two_level(factor)[1])[1] for factor in (1.0, WORST)})


@dataclass(frozen=True)
class _Load:
    """The load of one MoE layer in one micro-batch."""

    time: LayerTime
    hot_expert_tokens: float
    busiest_rank_tokens: float


class _View:
    """One job at one degree on one device."""

    def __init__(
        self, job: JobModel, hardware: Hardware, usable_bytes: float, num_hot_experts: int
    ) -> None:
        self.job = job
        self.hardware = hardware
        self.usable_bytes = usable_bytes
        self.num_hot_experts = num_hot_experts
        self.placement = Placement(
            tokens_per_rank=job.tokens_per_rank,
            ep_degree=job.ep_degree,
            expert_shards=job.tp_degree if job.ep_degree == 1 else 1,
        )
        self.worst = min(layer.num_experts / layer.top_k for layer in job.moe_layers.values())

    def two_level(self, factor: float) -> tuple[dict[int, _Load], dict[int, np.ndarray]]:
        """Loads by layer, and tokens received by layer on a rank that is hot in all of them."""
        loads = {}
        known: dict = {}
        for number, layer in self.job.moe_layers.items():
            if layer not in known:
                time = moe_layer_time(
                    layer,
                    self.placement,
                    self.hardware,
                    imbalance_factor=factor,
                    num_hot_experts=self.num_hot_experts,
                )
                load = layer_load(layer, self.placement, factor, self.num_hot_experts)
                known[layer] = _Load(time, float(load.hot_tokens), float(load.tokens_on_device))
            loads[number] = known[layer]
        return loads, {n: np.array(load.busiest_rank_tokens) for n, load in loads.items()}

    def measured(
        self, counts_ME: np.ndarray, placement_name: str, known_ME: np.ndarray
    ) -> tuple[dict[int, _Load], dict[int, np.ndarray]]:
        """The same from measured counts; a greedy placement is made for ``known_ME``."""
        loads, received = {}, {}
        degree = self.placement.ep_degree
        for row, (number, layer) in enumerate(self.job.moe_layers.items()):
            experts_dn = (
                contiguous(layer.num_experts, degree)
                if placement_name == "contiguous"
                # Which device is the first is free: the hottest one is another in every layer.
                else np.roll(greedy(known_ME[row], degree), row, axis=0)
            )
            tokens_dn = tokens_of_experts(
                counts_ME[row], experts_dn, self.placement.tokens * layer.top_k
            )
            time = measured_layer_time(layer, self.placement, self.hardware, tokens_dn)
            received[number] = tokens_dn.sum(axis=-1)
            loads[number] = _Load(time, float(tokens_dn.max()), float(received[number].max()))
        return loads, received

    def memory(self, received: dict[int, np.ndarray]) -> tuple[float, int]:
        """Bytes on the rank that needs most, and its pipeline rank."""
        needs = {
            position: state.total_bytes
            + float(np.max(activation_peak(self.job, self.placement, position, received)))
            for position, state in self.job.states.items()
        }
        position = max(needs, key=lambda key: needs[key])
        return needs[position], position

    def outcome(
        self,
        loads: dict[int, _Load],
        received: dict[int, np.ndarray],
        balance: Outcome | None,
    ) -> Outcome:
        """Means over the MoE layers, the step, and the memory."""

        def mean(value) -> float:
            return float(np.mean([value(load) for load in loads.values()]))

        memory, position = self.memory(received)
        layer = mean(lambda load: load.time.total(self.job.checkpointing))
        step = step_time(self.job, self.hardware, lambda number: loads[number].time)
        return Outcome(
            compute_seconds=mean(lambda load: load.time.compute),
            dispatch_seconds=mean(lambda load: load.time.dispatch),
            combine_seconds=mean(lambda load: load.time.combine),
            layer_seconds=layer,
            layer_slowdown=layer / balance.layer_seconds if balance else 1.0,
            step_seconds=float(step),
            step_slowdown=float(step) / balance.step_seconds if balance else 1.0,
            hot_expert_tokens=max(load.hot_expert_tokens for load in loads.values()),
            busiest_rank_tokens=max(load.busiest_rank_tokens for load in loads.values()),
            memory_bytes=memory,
            memory_rank=self.job.states[position].rank,
            fits=memory <= self.usable_bytes,
        )

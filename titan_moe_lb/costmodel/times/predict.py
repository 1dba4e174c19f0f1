"""Step time and memory of a job at one expert-parallel degree, under every load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from titan_moe_lb.costmodel.hardware.device import Hardware
from titan_moe_lb.costmodel.loads.expert_load import WORST
from titan_moe_lb.costmodel.loads.lognormal import Spread
from titan_moe_lb.costmodel.loads.recorded import RecordedLoads
from titan_moe_lb.costmodel.times.activation import largest_that_fits
from titan_moe_lb.costmodel.times.job import JobModel
from titan_moe_lb.costmodel.times.outcome import Outcome, View
from titan_moe_lb.costmodel.times.placed_experts import label, placed_experts, placements
from titan_moe_lb.traces.capacity import (
    capacity_factor,
    non_blocking_capacity_factor,
    overrun_factor,
    worst_capacity_factor,
)
from titan_moe_lb.traces.expert_order import contiguous

CURVE_POINTS = 17


@dataclass(frozen=True, kw_only=True)
class PlannedLoads:
    """Loads to plan with, which the MoE layers of the job can have."""

    factors: Sequence[float]
    """Imbalances of the two-level load, each in [1, E/K], or -1 for E/K."""
    num_hot_experts: int
    spreads: Sequence[Spread]
    """Log-normal loads."""
    recorded: RecordedLoads | None
    """Loads of a run, for each MoE layer of the job."""
    redundant_experts: Sequence[int]
    """Numbers of slots for copies to place the recorded loads with."""
    drop_share: float
    """Share of the tokens that the second capacity may drop, and of the micro-batches that may
    overrun it."""


@dataclass(frozen=True, kw_only=True)
class AnalyticRow:
    """Outcome at one imbalance of the two-level load."""

    imbalance_factor: float
    outcome: Outcome


@dataclass(frozen=True, kw_only=True)
class LogNormalRow(Spread):
    """Outcome under log-normal loads, drawn for every layer by itself; mean over draws."""

    outcome: Outcome


@dataclass(frozen=True, kw_only=True)
class MeasuredRow:
    """Outcomes under the load of a recorded run, with one placement of the experts."""

    placement: str
    """Placement of the experts: "contiguous" as in torchtitan, "greedy" as in
    ``titan-moe-lb place``, which keeps expert groups together, or "eplb" with copies."""
    redundant_experts: int
    """Slots for copies, summed over the devices."""
    first: Outcome
    """First steps, with experts placed for the last ones."""
    last: Outcome
    """Last steps, with experts placed for them: the most that a placement can save."""
    stale_second_half: Outcome
    """Second half of the run, with experts placed once, for its first half."""
    stale_last: Outcome
    """Last steps, with experts placed for the first half of the run."""

    @property
    def label(self) -> str:
        """Name of the placement in tables."""
        return label(self.placement, self.redundant_experts)


@dataclass(frozen=True, kw_only=True)
class CapacityRow:
    """Buffers of one size in every MoE layer, for the loads of a run's second half."""

    drop_share: float
    """Share of dropped tokens in the layer that drops most; 0 if no token is dropped."""
    capacity_factor: float
    """Buffer size of a rank, over its tokens at balance."""
    non_blocking_capacity_factor: float
    """Buffer size as a share of the worst case, as HybridEP's dispatcher defines it."""
    memory_bytes: float
    fits: bool


@dataclass(frozen=True, kw_only=True)
class OverrunRow:
    """DistMoE's capacities that a share of the micro-batches of a run's second half overrun."""

    overrun_share: float
    """Largest share of the micro-batches that overrun; 0 if none does."""
    micro_batches: int
    """Number of micro-batches of the planned size that were compared."""
    scratch_capacity_factor: float
    """Receive buffer of a rank, over its tokens at balance; ``vmm_capacity_factor`` likewise."""
    activation_slot_capacity_factor: float
    """Kept tokens of all layers of a stage, over those at balance."""
    worst_capacity_factor: float
    """The factor that no load can overrun."""


@dataclass(frozen=True, kw_only=True)
class DegreePlan:
    """Plan of a job at one expert-parallel degree."""

    ep_degree: int
    tokens_per_rank: int
    state_bytes: int
    """Bytes of parameters, gradients, optimizer state and FSDP's gathered parameters, on the
    rank that needs most memory at balance."""
    balance: Outcome
    rows: tuple[AnalyticRow, ...]
    lognormal: tuple[LogNormalRow, ...]
    largest_imbalance_that_fits: float | None
    curve: tuple[AnalyticRow, ...]
    """Imbalances from balance to the worst case, evenly spaced on a logarithmic scale."""
    measured: tuple[MeasuredRow, ...]
    """Empty without a recorded run."""
    capacity: tuple[CapacityRow, ...]
    """Empty without recorded micro-batches, as ``overruns``."""
    overruns: tuple[OverrunRow, ...]

    @property
    def fits_any_imbalance(self) -> bool:
        """True if the worst imbalance fits."""
        return self.largest_imbalance_that_fits == self.curve[-1].imbalance_factor


def plan_degree(
    job: JobModel, hardware: Hardware, loads: PlannedLoads, usable_bytes: float
) -> DegreePlan:
    """Plan a job at one expert-parallel degree, on a derated device.

    Raises:
        JobError: an imbalance or W is outside its range, or the devices do not divide the slots.
    """
    view = View(job, hardware, usable_bytes, loads.num_hot_experts)
    balance = view.outcome(view.two_level(1.0))

    def row(given: float) -> AnalyticRow:
        return AnalyticRow(
            imbalance_factor=view.worst if given == WORST else given,
            outcome=view.outcome(view.two_level(given), balance),
        )

    def lognormal(spread: Spread) -> LogNormalRow:
        shares_NME = spread.loads(list(job.moe_layers.values()))
        drawn = view.measured(shares_NME, _blocks(view))
        return LogNormalRow(**vars(spread), outcome=view.outcome(drawn, balance))

    recorded, shares = loads.recorded, (0.0, loads.drop_share)
    single = recorded if recorded and recorded.has_micro_batches else None
    return DegreePlan(
        ep_degree=job.ep_degree,
        tokens_per_rank=job.tokens_per_rank,
        state_bytes=job.states[view.memory_at(1.0)[1]].total_bytes,
        balance=balance,
        rows=tuple(map(row, loads.factors)),
        lognormal=tuple(map(lognormal, loads.spreads)),
        largest_imbalance_that_fits=largest_that_fits(
            lambda factor: view.memory_at(factor)[0] <= usable_bytes, view.worst
        ),
        curve=tuple(row(float(x)) for x in np.geomspace(1.0, view.worst, CURVE_POINTS)),
        measured=tuple(
            _measured(view, balance, recorded, *one) for one in placements(loads.redundant_experts)
        )
        if recorded
        else (),
        capacity=tuple(_capacity(view, single, share) for share in shares) if single else (),
        overruns=tuple(_overruns(view, single, shares)) if single else (),
    )


def heaviest_pipeline_ranks(job: JobModel, hardware: Hardware, num_hot_experts: int) -> list[int]:
    """Find the pipeline ranks with most memory at balance and in the worst case.

    For other expert-parallel degrees, only these ranks are built.
    """
    view = View(job, hardware, hardware.memory_bytes, num_hot_experts)
    return sorted({view.memory_at(factor)[1] for factor in (1.0, WORST)})


def _blocks(view: View) -> list[np.ndarray]:
    degree = view.job.ep_degree
    return [contiguous(layer.num_experts, degree) for layer in view.job.moe_layers.values()]


def _measured(
    view: View, balance: Outcome, recorded: RecordedLoads, placement: str, redundant: int
) -> MeasuredRow:
    degree = view.job.ep_degree
    first, last = slice(0, recorded.window), slice(-recorded.window, None)
    first_half, second_half = slice(0, max(1, recorded.half)), slice(recorded.half, None)

    def judged(steps: slice, known: slice) -> Outcome:
        """Outcome of these steps, with experts placed for the known ones."""
        placed = placed_experts(
            placement,
            view.job.moe_layers,
            recorded.known(known),
            ep_degree=degree,
            hardware=view.hardware,
            expert_groups=recorded.expert_groups,
            redundant_experts=redundant,
        )
        loads = view.measured(recorded.micro_batches(steps, _routed(view)), placed)
        return view.outcome(loads, balance, copies=redundant // degree)

    return MeasuredRow(
        placement=placement,
        redundant_experts=redundant,
        first=judged(first, known=last),
        last=judged(last, known=last),
        stale_second_half=judged(second_half, known=first_half),
        stale_last=judged(last, known=first_half),
    )


def _routed(view: View) -> float:
    """Routed tokens of a layer in one dispatch: tokens x top_k."""
    return view.role.tokens * next(iter(view.job.moe_layers.values())).top_k


def _capacity(view: View, recorded: RecordedLoads, drop_share: float) -> CapacityRow:
    layers, degree = view.job.moe_layers, view.job.ep_degree
    layer = next(iter(layers.values()))
    counts_NME = recorded.micro_batches(slice(recorded.half, None), _routed(view))
    received_MNR = np.stack(
        [load.received_NR for load in view.measured(counts_NME, _blocks(view)).values()]
    )
    factor = float(capacity_factor(received_MNR, drop_share).max())
    if drop_share == 0 and degree == recorded.ep_degree:
        factor = max(factor, recorded.max_overload_factor)
    balanced = view.role.tokens_per_rank
    memory, _position = view.memory(
        {number: np.full((1, 1), factor * balanced * one.top_k) for number, one in layers.items()}
    )
    return CapacityRow(
        drop_share=drop_share,
        capacity_factor=factor,
        non_blocking_capacity_factor=non_blocking_capacity_factor(
            factor, num_experts=layer.num_experts, top_k=layer.top_k, ep_degree=degree
        ),
        memory_bytes=memory,
        fits=memory <= view.usable_bytes,
    )


def _overruns(view: View, recorded: RecordedLoads, shares: Sequence[float]) -> list[OverrunRow]:
    layers, degree = view.job.moe_layers, view.job.ep_degree
    counts_NME = recorded.micro_batches(slice(recorded.half, None), _routed(view), most=None)
    received_MNR = np.stack(
        [
            counts_NME[:, row, : layer.num_experts].reshape(len(counts_NME), degree, -1).sum(-1)
            for row, layer in enumerate(layers.values())
        ]
    )
    stage_of = {number: i for i, one in enumerate(view.job.stages) for number in one.moe_layers}
    stages = [stage_of[number] for number in layers]
    worst = max(
        worst_capacity_factor(num_experts=layer.num_experts, top_k=layer.top_k, ep_degree=degree)
        for layer in layers.values()
    )

    def row(share: float) -> OverrunRow:
        scratch = overrun_factor(received_MNR, share)
        if share == 0 and degree == recorded.ep_degree:
            scratch = max(scratch, recorded.max_overload_factor)
        return OverrunRow(
            overrun_share=share,
            micro_batches=len(counts_NME),
            scratch_capacity_factor=scratch,
            activation_slot_capacity_factor=overrun_factor(received_MNR, share, stages),
            worst_capacity_factor=worst,
        )

    return [row(share) for share in shares]

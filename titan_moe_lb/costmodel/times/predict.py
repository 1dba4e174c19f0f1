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
from titan_moe_lb.traces.capacity import capacity_factor, non_blocking_capacity_factor
from titan_moe_lb.traces.expert_order import contiguous

CURVE_POINTS = 17


@dataclass(frozen=True, kw_only=True)
class AnalyticRow:
    """One imbalance of the two-level load."""

    imbalance_factor: float
    outcome: Outcome


@dataclass(frozen=True, kw_only=True)
class LogNormalRow(Spread):
    """Log-normal loads, drawn anew in every layer; mean over draws."""

    outcome: Outcome


@dataclass(frozen=True, kw_only=True)
class MeasuredRow:
    """The load of a recorded run, under one placement."""

    placement: str
    """"contiguous", as torchtitan places experts; "greedy", what ``titan-moe-lb place`` does, in
    which groups of experts stay together; or "eplb" with copies."""
    redundant_experts: int
    """Slots for copies, all devices together."""
    first: Outcome
    """The first steps; placed for the last ones."""
    last: Outcome
    """The last steps, for which it is placed: the most that placing can buy."""
    stale_second_half: Outcome
    """The second half of the run, placed for its first half: what placing once buys."""
    stale_last: Outcome
    """The last steps, placed for the first half of the run."""

    @property
    def label(self) -> str:
        return label(self.placement, self.redundant_experts)


@dataclass(frozen=True, kw_only=True)
class CapacityRow:
    """Buffers of one size in every MoE layer, for the loads of the second half of a run."""

    drop_share: float
    """Share of dropped tokens in the layer that drops most; 0: none is dropped."""
    capacity_factor: float
    """Room of a rank over its balanced tokens."""
    non_blocking_capacity_factor: float
    """Room as a share of the worst case, the unit of HybridEP's dispatcher."""
    memory_bytes: float
    fits: bool


@dataclass(frozen=True, kw_only=True)
class DegreePlan:
    """One expert-parallel degree."""

    ep_degree: int
    tokens_per_rank: int
    state_bytes: int
    """Parameters, gradients, optimizer state and what FSDP gathers, on the rank that
    needs most memory at balance."""
    balance: Outcome
    rows: tuple[AnalyticRow, ...]
    lognormal: tuple[LogNormalRow, ...]
    largest_imbalance_that_fits: float | None
    curve: tuple[AnalyticRow, ...]
    """Imbalances from balance to the worst case, evenly on a logarithmic scale."""
    measured: tuple[MeasuredRow, ...] = ()
    capacity: tuple[CapacityRow, ...] = ()


def plan_degree(
    job: JobModel,
    hardware: Hardware,
    imbalance_factors: Sequence[float],
    *,
    num_hot_experts: int,
    usable_bytes: float,
    spreads: Sequence[Spread] = (),
    recorded: RecordedLoads | None = None,
    redundant_experts: Sequence[int] = (),
    drop_share: float = 0.01,
) -> DegreePlan:
    """Plan one expert-parallel degree.

    Args:
        imbalance_factors: each in [1, E/K], or -1 for E/K.
        num_hot_experts: W.
        usable_bytes: of a device's memory.
        spreads: of log-normal loads.
        recorded: loads of a run of the same model.
        redundant_experts: numbers of slots for copies to place the recorded loads with.
        drop_share: of the tokens, for a capacity that drops some.

    Raises:
        JobError: an imbalance or W outside its range, slots that the devices do not divide.
    """
    view = View(job, hardware, usable_bytes, num_hot_experts)
    balance = view.outcome(view.two_level(1.0))

    def row(given: float) -> AnalyticRow:
        return AnalyticRow(
            imbalance_factor=view.worst if given == WORST else given,
            outcome=view.outcome(view.two_level(given), balance),
        )

    def lognormal(spread: Spread) -> LogNormalRow:
        shares = spread.loads(list(job.moe_layers.values()))
        loads = view.measured(shares, _blocks(view))
        return LogNormalRow(**vars(spread), outcome=view.outcome(loads, balance))

    measured: list[MeasuredRow] = []
    capacity: list[CapacityRow] = []
    if recorded:
        measured = [
            _measured(view, balance, recorded, *one) for one in placements(redundant_experts)
        ]
    if recorded and recorded.has_micro_batches:
        capacity = [_capacity(view, recorded, share) for share in (0.0, drop_share)]
    return DegreePlan(
        ep_degree=job.ep_degree,
        tokens_per_rank=job.tokens_per_rank,
        state_bytes=job.states[view.memory_at(1.0)[1]].total_bytes,
        balance=balance,
        rows=tuple(map(row, imbalance_factors)),
        lognormal=tuple(map(lognormal, spreads)),
        largest_imbalance_that_fits=largest_that_fits(
            lambda factor: view.memory_at(factor)[0] <= usable_bytes, view.worst
        ),
        curve=tuple(row(float(x)) for x in np.geomspace(1.0, view.worst, CURVE_POINTS)),
        measured=tuple(measured),
        capacity=tuple(capacity),
    )


def heaviest_pipeline_ranks(job: JobModel, hardware: Hardware, num_hot_experts: int) -> list[int]:
    """Pipeline ranks with most memory at balance and at worst; other degrees build these alone."""
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
    """Tokens x top_k that a layer dispatches together."""
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

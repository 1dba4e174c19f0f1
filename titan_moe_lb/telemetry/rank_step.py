"""Loads, biases and gradients of a finished step on one rank: the input of every metric.

Shape suffixes: N = routers of the rank, M = micro-batches, S = count sources,
E = experts, R = ranks of an EP group; W and F as in
:mod:`titan_moe_lb.balancing.recording.score_sums`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.distributed as dist

from titan_moe_lb.balancing import choice
from titan_moe_lb.balancing.hash_router import is_hash_router
from titan_moe_lb.balancing.recording.score_sums import Column
from titan_moe_lb.balancing.recording.step_record import StepRecord
from titan_moe_lb.balancing.router import LoadBalancedRouter
from titan_moe_lb.parallel.local_shard import local_shard, squared_norm
from titan_moe_lb.parallel.rank_groups import RankGroups
from titan_moe_lb.parallel.schedules import Action, actions_of
from titan_moe_lb.traces.balance_statistics import mark_absent, num_existing


@dataclass(frozen=True)
class ScoreStep:
    """Sums over the valid tokens of all ranks, as numpy arrays on the host."""

    columns_NWF: np.ndarray
    """Sums of the products of weight and column, float64."""
    probabilities_NE: np.ndarray
    """Sums of the probabilities of each expert, float64."""
    largest_logit_N: np.ndarray
    """Largest absolute logit of the tokens of this rank, float64."""
    num_experts_N: np.ndarray
    input_size_N: np.ndarray
    """Numbers in the input of each gate."""
    has_margin_N: np.ndarray
    """True for a router whose scores choose, and that has an expert left to choose, bool."""

    @cached_property
    def tokens_N(self) -> np.ndarray:
        """Valid tokens of each router, float64; NaN for a router without any."""
        tokens_N = self.columns_NWF[:, Column.TOKEN, Column.TOKEN]
        return np.where(tokens_N > 0, tokens_N, np.nan)

    def mean(self, column: int, weight: Column = Column.TOKEN) -> np.ndarray:
        """Compute the mean over the tokens of a column times a weight, float64 ``(N,)``."""
        return self.columns_NWF[:, weight, column] / self.tokens_N

    def mean_square(self, column: Column) -> np.ndarray:
        """Compute the mean square of a column that is a weight too, float64 ``(N,)``."""
        return self.mean(column, column)

    def of_margin(self, values_N: np.ndarray) -> np.ndarray:
        """Replace the values of routers without a margin by NaN."""
        return np.where(self.has_margin_N, values_N, np.nan)


@dataclass(frozen=True)
class RankStep:
    """Finished step of at least one router, as numpy arrays on the host.

    E is the largest number of experts of a router. Routers with fewer are padded: counts with
    :data:`~titan_moe_lb.traces.balance_statistics.ABSENT`, biases with NaN.
    """

    counts_NME: np.ndarray
    """Tokens per expert of each micro-batch, summed over the EP group, int64."""
    global_counts_NE: np.ndarray
    """Tokens per expert of the step, summed over all ranks, int64."""
    valid_counts_NE: np.ndarray | None
    """Valid tokens per expert of the step over all ranks, int64; None without a token mask."""
    bias_NE: np.ndarray | None
    """Expert biases after the step, float32; NaN for a layer without biases, None if no layer has
    any."""
    bias_delta_NE: np.ndarray | None
    """Change of the expert biases in the step, float32; NaN for a layer without a change, None if
    no layer has one."""
    gradient_squares_N2: np.ndarray | None
    """Squared norms of the gradients of the model's loss and of the aux losses, float32.

    The gradients are with respect to the logits of this rank's tokens; NaN in a hash layer. None
    unless the job measures router gradients."""
    frozen_gate_squares_N: np.ndarray | None
    """Squared norms of the weights of frozen gates, of which this rank's part: the mean over the
    ranks is the norm of the whole gate. float64; NaN for a gate that learns, None if all learn."""
    scores: ScoreStep | None
    """Sums of the scores; None in a job that does not record them."""
    stages: tuple[int, ...]
    """Pipeline stage of each router."""
    actions: Sequence[Action]
    """Actions of this pipeline rank in one pass; see :mod:`titan_moe_lb.parallel.schedules`."""
    ep_degree: int
    ep_rank: int

    @cached_property
    def received_NMR(self) -> np.ndarray:
        """Tokens that each rank of the EP group receives, int64 ``(N, M, R)``.

        Rank r holds the experts ``[r E/R, (r+1) E/R)`` of a router with E experts.
        """
        num_experts_N = num_existing(self.counts_NME[:, 0])
        return np.stack(
            [
                counts_ME[:, :num_experts].reshape(len(counts_ME), self.ep_degree, -1).sum(axis=-1)
                for counts_ME, num_experts in zip(self.counts_NME, num_experts_N, strict=True)
            ]
        )


def read(
    routers: list[LoadBalancedRouter],
    record: StepRecord,
    groups: RankGroups,
    biases: list[torch.Tensor | None],
) -> RankStep:
    """Read the last finished step. Collective over the EP group; synchronises with the device."""
    ran = record.step_micro_batches
    # A step without a forward counts as one micro-batch without tokens.
    num_ran = None if ran is None else max(1, int(ran))
    counts = record.step_counts_NMSE[:, :num_ran, 0].clone()
    if groups.experts.size > 1:
        dist.all_reduce(counts, group=groups.experts.group)
    assert record.sums is not None
    padded = routers[0].config.loop.padded
    sums_NSE = record.sums.counts_NSE
    num_experts_N = np.array([router.num_experts for router in routers])

    def existing(table: torch.Tensor) -> np.ndarray:
        return mark_absent(table.cpu().numpy(), num_experts_N)

    squares_N2 = None
    if record.step_gradient_squares_N2 is not None:
        squares_N2 = record.step_gradient_squares_N2.detach().cpu().numpy().copy()
        squares_N2[[is_hash_router(router.config) for router in routers]] = np.nan
    return RankStep(
        counts_NME=existing(counts),
        global_counts_NE=existing(sums_NSE[:, 0]),
        valid_counts_NE=existing(sums_NSE[:, routers[0].sources.valid]) if padded else None,
        bias_NE=_rows([None if bias is None else local_shard(bias) for bias in biases]),
        bias_delta_NE=_rows(record.bias_delta_N),
        gradient_squares_N2=squares_N2,
        frozen_gate_squares_N=_frozen_gates(routers),
        scores=_read_scores(routers, record),
        stages=tuple(router.stage for router in routers),
        actions=routers[0].actions or actions_of(None)[0],
        ep_degree=groups.experts.size,
        ep_rank=groups.experts.rank,
    )


def _read_scores(routers: list[LoadBalancedRouter], record: StepRecord) -> ScoreStep | None:
    """Read the reduced sums of scores; None in a job that does not record them."""
    if record.scores is None:
        return None
    assert record.sums is not None and record.sums.scores is not None
    columns_NWF, probabilities_NE = (table.cpu().numpy() for table in record.sums.scores)
    return ScoreStep(
        columns_NWF=columns_NWF,
        probabilities_NE=probabilities_NE,
        largest_logit_N=record.scores.largest_logit_N1[:, 0].cpu().numpy().astype(np.float64),
        num_experts_N=np.array([router.num_experts for router in routers]),
        input_size_N=np.array([router.gate.weight.shape[-1] for router in routers]),
        has_margin_N=np.array(
            [not choice.is_forced(r) and r.top_k < choice.open_experts(r) for r in routers]
        ),
    )


def _frozen_gates(routers: list[LoadBalancedRouter]) -> np.ndarray | None:
    """Compute the squared norms of the frozen gates; NaN for others, None if none is frozen."""
    frozen = ["gate" in router.config.frozen for router in routers]
    if not any(frozen):
        return None
    gates = [router.gate for router, yes in zip(routers, frozen, strict=True) if yes]
    norms = [sum(map(squared_norm, gate.parameters()), torch.zeros(())) for gate in gates]
    squares_N = np.full(len(routers), np.nan)
    squares_N[frozen] = torch.stack(norms).cpu().numpy()
    return squares_N


def _rows(rows: list[torch.Tensor | None]) -> np.ndarray | None:
    """Stack rows of different lengths, padded with NaN; a None row is NaN. None if all are None."""
    known = [row for row in rows if row is not None]
    if not known:
        return None
    values = torch.cat(known).detach().cpu().numpy()  # synchronises once
    table = np.full((len(rows), max(len(row) for row in known)), np.nan, dtype=values.dtype)
    start = 0
    for index, row in enumerate(rows):
        if row is not None:
            table[index, : len(row)] = values[start : start + len(row)]
            start += len(row)
    return table

"""From what each rank recorded to the load of the step, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torchtitan.distributed import ParallelDims
from torchtitan.tools.utils import device_type

from titan_moe_lb.losses.base import AuxLoss
from titan_moe_lb.parallel import layout
from titan_moe_lb.telemetry import overload
from titan_moe_lb.traces.balance_statistics import max_violation
from titan_moe_lb.traces.step_load import StepLoad

if TYPE_CHECKING:
    from titan_moe_lb.router import LoadBalancedRouter


def reduce_step(routers: list[LoadBalancedRouter], parallel_dims: ParallelDims) -> StepLoad:
    """The load of the last finished step. Collective: call on every rank.

    The number of collectives does not depend on the number of layers: one over the EP
    group, two SUM and one MAX over each mesh axis that splits the tokens of a pipeline
    stage, and one SUM and one MAX over the stages. A stage without MoE layers passes no routers
    and contributes nothing.
    """
    figures = None
    if routers:
        reduce_over_tokens(routers, parallel_dims)
        figures = _over_token_ranks(_own_figures(routers, parallel_dims), parallel_dims)
    return _over_stages(routers, figures, parallel_dims)


def reduce_over_tokens(routers: list[LoadBalancedRouter], parallel_dims: ParallelDims) -> None:
    """Fill ``global_counts_SE`` and ``global_losses_A`` of the recorders, once a step.

    One SUM for all layers of the stage over each axis that splits tokens.
    """
    recorders = [router.recorder for router in routers]
    if not recorders or all(recorder.reduced for recorder in recorders):
        return
    # float64 holds the counts exactly up to 2**53 and takes the losses along.
    parts = [
        part.double().flatten()
        for r in recorders
        for part in (r.step_counts_MSE.sum(dim=0), r.step_losses_A)
    ]
    fused = torch.cat(parts)
    _all_reduce(fused, dist.ReduceOp.SUM, parallel_dims)
    sums = iter(fused.split([part.numel() for part in parts]))
    for recorder in recorders:
        recorder.global_counts_SE.copy_(next(sums).view_as(recorder.global_counts_SE))
        recorder.global_losses_A.copy_(next(sums))
        recorder.reduced = True


@dataclass
class _Figures:
    """Overload of the N routers of a rank, or of a stage."""

    avg_overload_N: np.ndarray
    violation_N: np.ndarray
    max_overload_N: np.ndarray
    max_cum_overload: float


def _own_figures(routers: list[LoadBalancedRouter], parallel_dims: ParallelDims) -> _Figures:
    """What this rank knows, with the counts of its EP group. Waits for the device."""
    ep, rank = parallel_dims.ep, 0
    counts = torch.stack([router.recorder.step_counts_MSE[:, 0] for router in routers])
    if parallel_dims.ep_enabled:
        mesh = parallel_dims.get_mesh("ep")
        rank = mesh.get_local_rank()
        dist.all_reduce(counts, group=mesh.get_group())
    counts_NME = counts.cpu().numpy()
    received_NMR = overload.tokens_per_rank(counts_NME, ep)
    balanced_NM = received_NMR.mean(axis=-1)
    factors_NM = overload.overload_factors(received_NMR, balanced_NM)
    cumulative = 1.0
    if ep > 1:
        forward_NM, backward_NM = (
            torch.stack([getattr(router.clock, name) for router in routers]).cpu().numpy()
            for name in ("step_forward_times_M", "step_backward_times_M")
        )
        cumulative = overload.cumulative_overload_factor(
            forward_NM, backward_NM, received_NMR[..., rank], balanced_NM
        )
    return _Figures(
        avg_overload_N=factors_NM.mean(axis=1),
        violation_N=max_violation(counts_NME).mean(axis=1),
        max_overload_N=factors_NM.max(axis=1),
        max_cum_overload=cumulative,
    )


def _over_token_ranks(own: _Figures, parallel_dims: ParallelDims) -> _Figures:
    """Mean and maximum over the ranks of the stage."""
    means = _tensor(np.concatenate([own.avg_overload_N, own.violation_N]))
    means /= _all_reduce(means, dist.ReduceOp.SUM, parallel_dims)
    maxima = _tensor(np.append(own.max_overload_N, own.max_cum_overload))
    _all_reduce(maxima, dist.ReduceOp.MAX, parallel_dims)
    avg_overload_N, violation_N = np.split(means.cpu().numpy(), 2)
    *max_overload_N, max_cum_overload = maxima.tolist()
    return _Figures(avg_overload_N, violation_N, np.array(max_overload_N), max_cum_overload)


def _over_stages(
    routers: list[LoadBalancedRouter], figures: _Figures | None, parallel_dims: ParallelDims
) -> StepLoad:
    """Put the layers of all stages together: every stage fills its own rows of one table.

    The table is summed, so that a row is exactly what its stage wrote.
    """
    names = sorted(loss.metric_name for loss in AuxLoss.kinds.values())
    num_rows = max((router.layer for router in routers), default=-1) + 1
    num_experts = routers[0].num_experts if routers else 0
    if parallel_dims.pp_enabled:
        # A stage without MoE layers learns here how large the table is.
        shape = torch.tensor([num_rows, num_experts], device=device_type)
        group = parallel_dims.get_mesh("pp").get_group()
        dist.all_reduce(shape, op=dist.ReduceOp.MAX, group=group)
        num_rows, num_experts = shape.tolist()
    # Columns: present, four figures, a flag and a value for each loss, the counts.
    first_loss, first_count = 5, 5 + 2 * len(names)
    rows = np.zeros((num_rows, first_count + num_experts))
    if figures is not None:
        layers = [router.layer for router in routers]
        rows[layers, 0] = 1.0
        rows[layers, 1] = figures.max_cum_overload
        rows[layers, 2] = figures.avg_overload_N
        rows[layers, 3] = figures.max_overload_N
        rows[layers, 4] = figures.violation_N
        values = iter(torch.cat([r.recorder.global_losses_A for r in routers]).tolist())
        for router in routers:
            for loss in router.aux_losses.values():
                column = first_loss + 2 * names.index(loss.metric_name)
                rows[router.layer, column : column + 2] = 1.0, next(values)
        counts_NE = torch.stack([r.recorder.global_counts_SE[0] for r in routers])
        rows[layers, first_count:] = counts_NE.cpu().numpy()
    if parallel_dims.pp_enabled:
        table = _tensor(rows)
        dist.all_reduce(table, group=group)
        rows = table.cpu().numpy()
    present = np.flatnonzero(rows[:, 0])
    rows = rows[present]
    flags, raw = rows[:, first_loss:first_count:2], rows[:, first_loss + 1 : first_count : 2]
    return StepLoad(
        layers=tuple(present.tolist()),
        counts_ME=rows[:, first_count:].astype(np.int64),
        losses={
            name: np.where(flags[:, i] > 0, raw[:, i], np.nan)
            for i, name in enumerate(names)
            if flags[:, i].any()
        },
        avg_overload_factor_M=rows[:, 2],
        max_overload_factor_M=rows[:, 3],
        micro_batch_max_violation_M=rows[:, 4],
        max_cum_overload_factor=float(rows[:, 1].max(initial=1.0)),
    )


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64).to(device_type)


def _all_reduce(
    tensor: torch.Tensor, op: dist.ReduceOp.RedOpType, parallel_dims: ParallelDims
) -> int:
    """Reduce in place over the ranks that route other tokens; how many there are."""
    num_ranks = 1
    for axis in layout.token_axes(parallel_dims):
        mesh = parallel_dims.get_mesh(axis)
        dist.all_reduce(tensor, op=op, group=mesh.get_group())
        num_ranks *= mesh.size()
    return num_ranks

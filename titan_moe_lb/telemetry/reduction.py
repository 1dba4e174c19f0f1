"""From what each rank recorded to the numbers of the step, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torchtitan.distributed import ParallelDims
from torchtitan.tools.utils import device_type

from titan_moe_lb.losses.base import AuxLoss
from titan_moe_lb.router import LoadBalancedRouter
from titan_moe_lb.telemetry.imbalance import max_violation
from titan_moe_lb.telemetry.recorder import LoadRecorder


@dataclass(frozen=True, slots=True)
class StepLoad:
    """The MoE layers of a whole model over one global batch."""

    num_layers: int
    mean_max_violation: float
    """MaxVio of the global batch, mean over layers."""
    worst_max_violation: float
    """The same of the worst layer."""
    losses: dict[str, float]
    """Raw value of each loss by metric name, mean over the batch and the layers."""


def routers_of(model_parts: list[nn.Module]) -> list[LoadBalancedRouter]:
    """The routers of this rank's pipeline stages."""
    return [
        module
        for part in model_parts
        for module in part.modules()
        if isinstance(module, LoadBalancedRouter)
    ]


def reduce_step(routers: list[LoadBalancedRouter], parallel_dims: ParallelDims) -> StepLoad:
    """Reduce the recorders' last step over the ranks. Collective: call on every rank.

    One SUM over the ranks that split the tokens of a stage, and one SUM and one
    MAX over the pipeline stages, whatever the number of layers. A stage without
    MoE layers passes no routers and contributes nothing.
    """
    names = sorted(loss.metric_name for loss in AuxLoss.kinds.values())
    # Layers, sum of MaxVio over them, then for each loss the layers that have it and the sum.
    sums = torch.zeros(2 + 2 * len(names), dtype=torch.float64, device=device_type)
    worst = torch.zeros(1, dtype=torch.float64, device=device_type)
    if routers:
        recorders = [router.recorder for router in routers]
        reduce_over_tokens(recorders, parallel_dims)
        violations = max_violation(torch.stack([r.step_counts_SE[0] for r in recorders]).double())
        sums[0], sums[1], worst[0] = len(routers), violations.sum(), violations.max()
        for router in routers:
            values = router.recorder.step_losses_A
            for loss, value in zip(router.aux_losses.values(), values, strict=True):
                slot = 2 + 2 * names.index(loss.metric_name)
                sums[slot] += 1
                sums[slot + 1] += value
    if parallel_dims.pp_enabled:
        group = parallel_dims.get_mesh("pp").get_group()
        dist.all_reduce(sums, group=group)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=group)
    num_layers, violation_sum, *loss_sums = sums.tolist()
    return StepLoad(
        num_layers=int(num_layers),
        mean_max_violation=violation_sum / max(num_layers, 1.0),
        worst_max_violation=worst.item(),
        losses={
            name: total / layers
            for name, layers, total in zip(names, loss_sums[::2], loss_sums[1::2], strict=True)
            if layers
        },
    )


def reduce_over_tokens(recorders: list[LoadRecorder], parallel_dims: ParallelDims) -> None:
    """Sum the snapshots over the ranks that route other tokens, in place, once a step.

    One collective for all layers of the stage; none where no axis splits tokens.
    """
    if not recorders or all(recorder.reduced for recorder in recorders):
        return
    axes = _token_axes(parallel_dims)
    if axes:
        # float64 holds the counts exactly up to 2**53 and takes the losses along.
        parts = [
            part.double().flatten()
            for r in recorders
            for part in (r.step_counts_SE, r.step_losses_A)
        ]
        fused = torch.cat(parts)
        for axis in axes:
            dist.all_reduce(fused, group=parallel_dims.get_mesh(axis).get_group())
        sums = iter(fused.split([part.numel() for part in parts]))
        for recorder in recorders:
            recorder.step_counts_SE.copy_(next(sums).view_as(recorder.step_counts_SE))
            recorder.step_losses_A.copy_(next(sums))
    for recorder in recorders:
        recorder.reduced = True


def _token_axes(parallel_dims: ParallelDims) -> list[str]:
    """Mesh axes whose ranks route different tokens: DP and CP, and TP when EP is on."""
    axes = ["loss"] if parallel_dims.dp_cp_enabled else []
    if parallel_dims.ep_enabled and parallel_dims.tp_enabled:
        axes.append("tp")
    return axes

"""From what each rank recorded to the load of the step, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torchtitan.models.common.moe import MoE
from torchtitan.tools.utils import device_type

from titan_moe_lb.balancing.losses.base import AuxLoss
from titan_moe_lb.balancing.router import LoadBalancedRouter
from titan_moe_lb.parallel.rank_groups import RankGroups
from titan_moe_lb.telemetry import rank_step
from titan_moe_lb.telemetry.metric import Metric, Reduction
from titan_moe_lb.traces.balance_statistics import ABSENT
from titan_moe_lb.traces.step_load import StepLoad


def reduce_step(layers: list[MoE], groups: RankGroups) -> StepLoad:
    """The load of the last finished step. Collective: call on every rank.

    The number of collectives does not depend on the number of layers: one over the EP
    group, one or two SUMs and one MAX over each mesh axis that splits the tokens of a
    pipeline stage, and one SUM and one MAX over the stages. A stage without MoE layers
    contributes nothing.

    Args:
        layers: the balanced MoE layers of this rank.
    """
    table = _Table.of_stage(layers, groups) if layers else None
    return _over_stages(table, groups)


def reduce_counts(
    layers: list[int], counts_NE: np.ndarray | None, groups: RankGroups
) -> np.ndarray:
    """Counts alone, of other tokens than a step's. Collective over the stages.

    Args:
        layers: numbers of this rank's layers; none for a stage without.
        counts_NE: tokens per expert over the ranks that route the tokens of the stage.

    Returns:
        ``(M, E)`` int64, the layers of all stages.
    """
    table = None
    if counts_NE is not None:
        table = _Table(layers, counts_NE, np.zeros_like(counts_NE), {})
    return _over_stages(table, groups).counts_ME


@dataclass
class _Table:
    """What one stage has of each of its layers."""

    layers: list[int]
    counts_NE: np.ndarray
    micro_batch_counts_NE: np.ndarray
    values: dict[str, np.ndarray]

    @classmethod
    def of_stage(cls, layers: list[MoE], groups: RankGroups) -> _Table:
        """Over the ranks that route the tokens of this stage. Waits for the device."""
        routers: list[LoadBalancedRouter] = [layer.router for layer in layers]  # type: ignore[misc]
        record = routers[0].step_record
        assert record is not None
        sums = record.reduce(groups.tokens)
        biases = [layer.expert_bias_E for layer in layers]
        step = rank_step.read(routers, record, groups, biases)
        measured = {name: kind().measure(step) for name, kind in Metric.kinds.items()}
        values, micro_batch_NE = _over_ranks(
            {k: v for k, v in measured.items() if v is not None},
            step.counts_NME[:, 0],
            groups.tokens,
        )
        losses_NA = sums.losses_NA.cpu().numpy()
        for index, loss in enumerate(routers[0].aux_losses.values()):
            values[loss.metric_name] = losses_NA[:, index]
        numbers = [router.layer for router in routers]
        return cls(numbers, step.global_counts_NE, micro_batch_NE, values)


def _over_ranks(
    measured: dict[str, np.ndarray],
    micro_batch_NE: np.ndarray,
    groups: Sequence[dist.ProcessGroup],
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """One SUM and one MAX over each group, whatever is measured.

    Of the micro-batches that of the first rank is handed to all: in the sum the others
    have zeros.
    """
    num_ranks = 1
    for group in groups:
        num_ranks *= dist.get_world_size(group)
    first = all(dist.get_rank(group) == 0 for group in groups)
    reduced = {}
    for operation in (dist.ReduceOp.SUM, dist.ReduceOp.MAX):
        names = [
            name
            for name in measured
            if (Metric.kinds[name].over_ranks is Reduction.MAX) == (operation is dist.ReduceOp.MAX)
        ]
        rows = [measured[name][None] for name in names]
        if operation is dist.ReduceOp.SUM:
            rows.append(micro_batch_NE.T * float(first))
        if not rows:
            continue
        table = _on_device(np.concatenate(rows))
        for group in groups:
            dist.all_reduce(table, op=operation, group=group)
        values = table.cpu().numpy()
        for name, values_N in zip(names, values[: len(names)], strict=True):
            mean = Metric.kinds[name].over_ranks is Reduction.MEAN
            reduced[name] = values_N / num_ranks if mean else values_N
        if operation is dist.ReduceOp.SUM:
            micro_batch_NE = values[len(names) :].T
    return reduced, micro_batch_NE


def _over_stages(table: _Table | None, groups: RankGroups) -> StepLoad:
    """Put the layers of all stages together: every stage fills its own rows of one table.

    The table is summed, so that a row is exactly what its stage wrote.
    """
    names = sorted({*Metric.kinds, *(loss.metric_name for loss in AuxLoss.kinds.values())})
    num_rows = max(table.layers) + 1 if table else 0
    num_experts = table.counts_NE.shape[1] if table else 0
    if groups.stages.size > 1:
        # A stage without MoE layers learns here how large the table is.
        shape = torch.tensor([num_rows, num_experts], device=device_type)
        dist.all_reduce(shape, op=dist.ReduceOp.MAX, group=groups.stages.group)
        num_rows, num_experts = shape.tolist()
    # Columns: the layer is there, both counts, and for each name a flag and a value.
    first = 1 + 2 * num_experts
    rows = np.zeros((num_rows, first + 2 * len(names)))
    if table is not None:
        rows[table.layers, 0] = 1.0
        room = ((0, 0), (0, num_experts - table.counts_NE.shape[1]))
        counts = [
            np.pad(counts_NE, room, constant_values=ABSENT)
            for counts_NE in (table.counts_NE, table.micro_batch_counts_NE)
        ]
        rows[table.layers, 1:first] = np.hstack(counts)
        for name, values_N in table.values.items():
            column = first + 2 * names.index(name)
            rows[table.layers, column] = 1.0
            rows[table.layers, column + 1] = values_N
    if groups.stages.size > 1:
        whole = _on_device(rows)
        dist.all_reduce(whole, group=groups.stages.group)
        rows = whole.cpu().numpy()
    present = np.flatnonzero(rows[:, 0])
    rows = rows[present]
    flags, values = rows[:, first::2], rows[:, first + 1 :: 2]
    figures = {
        name: np.where(flags[:, i] > 0, values[:, i], np.nan)
        for i, name in enumerate(names)
        if flags[:, i].any()
    }
    of_step = [name for name in figures if name in Metric.kinds and Metric.kinds[name].of_step]
    return StepLoad(
        layers=tuple(present.tolist()),
        counts_ME=rows[:, 1 : 1 + num_experts].astype(np.int64),
        micro_batch_counts_ME=rows[:, 1 + num_experts : first].astype(np.int64),
        step_columns={name: float(np.nanmax(figures.pop(name))) for name in of_step},
        figures=figures,
    )


def _on_device(values: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64).to(device_type)

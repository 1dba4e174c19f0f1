"""Reduction of all metrics over ranks and stages to the load of the step, equal on every rank.

Shape suffixes: N = layers of this rank, M = layers of the model, E = experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from titan_moe_lb.balancing.losses.base import AuxLoss
from titan_moe_lb.parallel.rank_groups import RankGroups
from titan_moe_lb.telemetry import rank_step
from titan_moe_lb.telemetry.metrics import Metric, Reduction
from titan_moe_lb.traces.balance_statistics import ABSENT
from titan_moe_lb.traces.step_load import StepLoad


def reduce_step(layers: Sequence[nn.Module], groups: RankGroups) -> StepLoad:
    """Reduce the last finished step. Collective over all ranks.

    The number of collectives does not depend on the number of layers:

    - one SUM over the EP group;
    - one or two SUMs and one MAX over each mesh axis that splits the tokens of a stage;
    - one SUM and one MAX over the pipeline stages.

    A stage without MoE layers contributes nothing.
    """
    return _over_stages(_of_stage(layers, groups) if layers else None, groups)


def reduce_counts(
    layers: list[int], counts_NE: np.ndarray | None, groups: RankGroups
) -> np.ndarray:
    """Gather the counts of the layers of all stages. Collective over the stages.

    A stage without MoE layers passes no layers, and None.
    """
    stage = None
    if counts_NE is not None:
        stage = _Stage(layers, counts_NE, np.zeros_like(counts_NE), {})
    return _over_stages(stage, groups).counts_ME


@dataclass
class _Stage:
    """Counts and named numbers of the layers of one pipeline stage."""

    layers: list[int]
    counts_NE: np.ndarray
    micro_batch_counts_NE: np.ndarray
    values: dict[str, np.ndarray]


def _of_stage(layers: Sequence[Any], groups: RankGroups) -> _Stage:
    """Reduce over the ranks that route tokens of this stage. Synchronises with the device."""
    routers = [layer.router for layer in layers]
    record = routers[0].step_record
    sums = record.reduce(groups.tokens)
    step = rank_step.read(routers, record, groups, [layer.expert_bias_E for layer in layers])
    measured = {name: kind().measure(step) for name, kind in Metric.kinds.items()}
    values, micro_batch_NE = _over_ranks(
        {name: values_N for name, values_N in measured.items() if values_N is not None},
        step.counts_NME[:, 0],
        groups,
    )
    losses_NA = sums.losses_NA.cpu().numpy()
    off_N = ["losses" in router.config.frozen for router in routers]
    for index, loss in enumerate(routers[0].aux_losses.values()):
        values[loss.metric_name] = np.ma.array(losses_NA[:, index], mask=off_N)
    return _Stage(
        [router.layer for router in routers], step.global_counts_NE, micro_batch_NE, values
    )


def _over_ranks(
    measured: dict[str, np.ndarray], micro_batch_NE: np.ndarray, groups: RankGroups
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Reduce all metrics together, with one SUM and one MAX over each group."""
    largest = [name for name in measured if Metric.kinds[name].over_ranks is Reduction.MAX]
    summed = [name for name in measured if name not in largest]
    # Every rank receives the micro-batch of the first rank: the others contribute zeros.
    first = all(dist.get_rank(group) == 0 for group in groups.tokens)
    table = np.vstack([*(measured[name] for name in summed), micro_batch_NE.T * float(first)])
    table = _all_reduce(table, dist.ReduceOp.SUM, groups.tokens)
    reduced = dict(zip(summed, table, strict=False))
    num_ranks = math.prod(dist.get_world_size(group) for group in groups.tokens)
    for name in summed:
        if Metric.kinds[name].over_ranks is Reduction.MEAN:
            reduced[name] = reduced[name] / num_ranks
    if largest:
        maxima = np.stack([measured[name] for name in largest])
        maxima = _all_reduce(maxima, dist.ReduceOp.MAX, groups.tokens)
        reduced |= zip(largest, maxima, strict=True)
    return reduced, table[len(summed) :].T


def _over_stages(stage: _Stage | None, groups: RankGroups) -> StepLoad:
    """Gather the layers of all stages in one table.

    Each stage fills the rows of its own layers, and zeros elsewhere. The sum over the stages
    therefore reproduces each row exactly.
    """
    names = sorted({*Metric.kinds, *(loss.metric_name for loss in AuxLoss.kinds.values())})
    pipeline = [groups.stages.group] if groups.stages.size > 1 else []
    # A stage without MoE layers does not know the size of the table.
    shape = [max(stage.layers) + 1, stage.counts_NE.shape[1]] if stage else [0, 0]
    num_rows, num_experts = _all_reduce(np.array(shape), dist.ReduceOp.MAX, pipeline).astype(int)
    # Columns: a flag for the layer, both counts, and a flag and a value for each name.
    first = 1 + 2 * num_experts
    rows = np.zeros((num_rows, first + 2 * len(names)))
    if stage is not None:
        rows[stage.layers, 0] = 1.0
        room = ((0, 0), (0, num_experts - stage.counts_NE.shape[1]))
        counts = [
            np.pad(counts_NE, room, constant_values=ABSENT)
            for counts_NE in (stage.counts_NE, stage.micro_batch_counts_NE)
        ]
        rows[stage.layers, 1:first] = np.hstack(counts)
        for name, values_N in stage.values.items():
            column = first + 2 * names.index(name)
            rows[stage.layers, column] = ~np.ma.getmaskarray(values_N)
            rows[stage.layers, column + 1] = np.ma.filled(values_N, 0.0)
    rows = _all_reduce(rows, dist.ReduceOp.SUM, pipeline)
    present = np.flatnonzero(rows[:, 0])
    rows = rows[present]
    flags, values = rows[:, first::2], rows[:, first + 1 :: 2]
    columns = {
        name: np.where(flags[:, i] > 0, values[:, i], np.nan)
        for i, name in enumerate(names)
        if flags[:, i].any()
    }
    of_step = [name for name in columns if name in Metric.kinds and Metric.kinds[name].of_step]
    return StepLoad(
        layers=tuple(present.tolist()),
        counts_ME=rows[:, 1 : 1 + num_experts].astype(np.int64),
        micro_batch_counts_ME=rows[:, 1 + num_experts : first].astype(np.int64),
        step_columns={name: float(np.nanmax(columns.pop(name))) for name in of_step},
        layer_columns=columns,
    )


def _all_reduce(
    values: np.ndarray, operation: Any, groups: Sequence[dist.ProcessGroup | None]
) -> np.ndarray:
    """Reduce in float64 over one group after the other."""
    if not groups:
        return values
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    table = torch.as_tensor(values, dtype=torch.float64).to(device)
    for group in groups:
        dist.all_reduce(table, op=operation, group=group)
    return table.cpu().numpy()

"""Toy pipeline of two ranks that records the order of its actions."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleSingle,
    _PipelineScheduleRuntime,
    get_schedule_class,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

from titan_moe_lb.parallel.schedules import Action, Schedule, actions_of

RANKS, MICRO_BATCHES = 2, 6


class _RecordingStage(PipelineStage):
    """Stage that records its actions."""

    ran: list[Action]

    def forward_one_chunk(self, fwd_chunk_id, *args, **kwargs):
        self.ran.append((self.stage_index, "F", fwd_chunk_id))
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id, *args, full_backward=True, **kwargs):
        self.ran.append((self.stage_index, "B" if full_backward else "I", bwd_chunk_id))
        return super().backward_one_chunk(
            bwd_chunk_id, *args, full_backward=full_backward, **kwargs
        )

    def backward_weight_one_chunk(self, bwd_chunk_id, **kwargs):
        self.ran.append((self.stage_index, "W", bwd_chunk_id))
        return super().backward_weight_one_chunk(bwd_chunk_id, **kwargs)


def stages_of_rank(
    rank: int, num_ranks: int, name: str, schedule_class: type
) -> tuple[list[int], int]:
    """Return the stages of this rank, and the number of all stages."""
    if issubclass(schedule_class, PipelineScheduleSingle):
        return [rank], num_ranks
    v_shaped = name in ("ZBVZeroBubble", "DualPipeV")
    return [rank, 2 * num_ranks - 1 - rank if v_shaped else rank + num_ranks], 2 * num_ranks


def accepted(name: str, num_ranks: int, most: int) -> list[int]:
    """List the numbers of micro-batches, up to ``most``, for which torch makes a schedule of so
    many ranks."""
    dist.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())
    schedule_class = get_schedule_class(name)
    mine, num_stages = stages_of_rank(0, num_ranks, name, schedule_class)
    stages = [PipelineStage(nn.Linear(4, 4), i, num_stages, torch.device("cpu")) for i in mine]
    numbers = []
    for number in range(1, most + 1):
        try:
            schedule_class(stages if len(stages) > 1 else stages[0], number)
        except ValueError:
            continue
        numbers.append(number)
    return numbers


def read_and_run(name: str, csv_rows: list[list[str]] | None, folder: str) -> tuple[Schedule, list]:
    """Return the actions of a schedule by :func:`actions_of`, and the actions that this rank
    ran."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    schedule_class = _PipelineScheduleRuntime if csv_rows else get_schedule_class(name)
    mine, num_stages = stages_of_rank(rank, RANKS, name, schedule_class)
    ran: list[Action] = []
    stages = []
    for index in mine:
        stage = _RecordingStage(nn.Linear(4, 4), index, num_stages, torch.device("cpu"))
        stage.ran = ran
        stages.append(stage)
    schedule = schedule_class(
        stages if len(stages) > 1 else stages[0], MICRO_BATCHES, loss_fn=nn.functional.mse_loss
    )
    if csv_rows:
        path = Path(folder) / f"schedule_{rank}.csv"
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(csv_rows)
        schedule._load_csv(str(path))
    batch = torch.ones(MICRO_BATCHES, 4)
    inputs = (batch,) if stages[0].is_first else ()
    schedule.step(*inputs, target=batch if any(stage.is_last for stage in stages) else None)
    return actions_of(schedule), ran

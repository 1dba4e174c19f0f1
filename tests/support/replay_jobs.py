"""Rollout that is recorded and trained on with another packing, on the ranks of a pool."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.support.own_loop_jobs import Layer
from titan_moe_lb.balancing.router import routers_of
from titan_moe_lb.own_loop.attach import attach
from titan_moe_lb.own_loop.balance import Balance
from titan_moe_lb.own_loop.routing_replay import RoutingReplay
from titan_moe_lb.parallel.local_shard import local_shard
from titan_moe_lb.parallel.rank_groups import RankGroups
from titan_moe_lb.run.train import trainer_config

ROWS, LENGTH = 4, 64
LENGTHS = {10: 64, 11: 40, 12: 24, 13: 30, 14: 34, 15: 20, 16: 44}
"""Tokens by sample."""
Choices = dict[tuple[int, int, int], tuple[int, ...]]
"""Experts by layer, sample and position."""


def batch(packing: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, samples and positions of whole rows; the remainder belongs to no sample."""
    tokens = torch.zeros(len(packing), LENGTH, dtype=torch.int64)
    samples, positions = torch.full_like(tokens, -1), torch.zeros_like(tokens)
    for row, packed in enumerate(packing):
        start = 0
        for sample in packed:
            end = start + LENGTHS[sample]
            positions[row, start:end] = torch.arange(end - start)
            tokens[row, start:end] = (positions[row, start:end] * 7 + sample) % 251
            samples[row, start:end] = sample
            start = end
        positions[row, start:] = torch.arange(LENGTH - start)
    return tokens, samples, positions


def rollout_and_training(
    arguments: list[str], rollout: list[list[int]], training: list[list[int]]
) -> dict[str, Any]:
    """Score one packing, negate every gate, and train on another packing.

    Returns:
        The experts that this rank's routers return: ``rollout``, ``own`` (training without replay),
        ``replayed``; the metrics; and the bytes in memory.
    """
    config = trainer_config(*arguments)
    config.metrics.write_moe_trace = False
    trainer = config.build()
    replay = RoutingReplay(
        Balance(trainer.model_parts, None, RankGroups.of(trainer.parallel_dims), 0)
    )
    trainer.metrics_processor.should_log = lambda step: False
    answers: Choices = {}

    def step(packing: list[list[int]]) -> Choices:
        dims = trainer.parallel_dims
        ranks = dims.dp_replicate * dims.dp_shard
        rank = dims.get_mesh("batch").get_local_rank() if ranks > 1 else 0
        mine = packing[rank * ROWS // ranks : (rank + 1) * ROWS // ranks]
        size = len(mine) // trainer.num_pipeline_parallel_microbatches
        parts = [batch(mine[start : start + size]) for start in range(0, len(mine), size)]
        answers.clear()

        def note(router: nn.Module, _args: tuple, output: tuple) -> None:
            ids_BLK = local_shard(output[1])
            samples, positions = router.rows
            for row, column in (samples >= 0).nonzero().tolist():
                place = int(samples[row, column]), int(positions[row, column])
                answers[router.layer, *place] = tuple(sorted(ids_BLK[row, column].tolist()))

        def remember_rows(part: nn.Module, _args: tuple, kwargs: dict[str, Any]) -> None:
            for router in routers_of([part]):
                router.rows = kwargs["sample_ids"], kwargs["positions"]

        hooks = [router.register_forward_hook(note) for router in routers_of(trainer.model_parts)]
        for part in trainer.model_parts:
            hooks.append(
                part.register_forward_pre_hook(remember_rows, with_kwargs=True, prepend=True)
            )
        batches = [
            ({"input": tokens, "positions": positions, "sample_ids": samples}, tokens)
            for tokens, samples, positions in parts
        ]
        trainer.step += 1
        trainer.train_step(iter(batches))
        for hook in hooks:
            hook.remove()
        return dict(answers)

    with replay.record():
        scored = step(rollout)
    replay.exchange()
    with torch.no_grad():
        for router in routers_of(trainer.model_parts):
            local_shard(router.gate.weight).neg_()
    with replay.record():  # another set of experts, whose record is put back below
        kept = [{k: v.copy() for k, v in part.memory.experts.items()} for part in replay._parts]
        own = step(training)
        for part, experts in zip(replay._parts, kept, strict=True):
            part.memory.experts = experts
    with replay.replay():
        replayed = step(training)
    result = {
        "rollout": scored,
        "own": own,
        "replayed": replayed,
        "metrics": replay.metrics(),
        "bytes": replay.num_bytes,
        "layers": len(routers_of(trainer.model_parts)),
    }
    trainer.close()
    return result


def samples_that_change_ranks() -> dict[str, Any]:
    """Run three iterations on ranks that each have the whole model, with other text in each.

    In an iteration, rank r records the whole sample r + iteration (modulo the ranks), in as many
    recordings as its number, and its part of sample 9, of which every rank has a part. An optimizer
    step follows.

    Returns:
        By iteration, after the exchange: the experts that this rank chose and those that it knows,
        by sample and position; and the steps off policy of all samples.
    """
    dist.init_process_group()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = Layer()
    balance = attach(model)
    replay = RoutingReplay(balance)
    chosen: dict[tuple[int, int], list[int]] = {}
    found: dict[str, Any] = {"chosen": [], "known": [], "off_policy": []}
    model.moe.router.register_forward_hook(lambda *call: ids.append(call[-1][1]))

    def record(sample: int, first: int) -> None:
        ids.clear()
        samples = torch.full((1, LENGTH // ranks), sample)
        positions = first + torch.arange(samples.shape[1]).unsqueeze(0)
        x = torch.randn(*samples.shape, 64)
        with torch.no_grad():
            model(x, sample_ids=samples, sample_positions=positions)
        for position, experts in zip(positions[0].tolist(), ids[0][0].tolist(), strict=True):
            chosen[sample, position] = experts

    ids: list[torch.Tensor] = []
    torch.manual_seed(rank)
    for iteration in range(3):
        chosen.clear()
        for _ in range(1 + rank):
            with replay.record():
                record((rank + iteration) % ranks, 0)
        replay.exchange()
        with replay.record():
            record(9, rank * LENGTH // ranks)
        replay.exchange()
        memory = replay._parts[0].memory
        found["chosen"].append(dict(chosen))
        found["known"].append(
            {
                (sample, position): experts_NK[0].tolist()
                for sample, ids_NTK in memory.experts.items()
                for position, experts_NK in enumerate(ids_NTK.swapaxes(0, 1))
            }
        )
        balance.begin_step(ranks)
        all_samples = torch.tensor([*range(ranks), 9])
        samples = all_samples.repeat_interleave(LENGTH // ranks).unsqueeze(0)
        with replay.replay():
            model(torch.randn(*samples.shape, 64), sample_ids=samples).sum().backward()
        balance.close_step()
        found["off_policy"].append(replay.metrics()["moe/replay_off_policy_steps_max"])
    return found

"""Every token of a rollout gets its experts again in training, however both are packed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.replay_jobs import LENGTHS, batch, rollout_and_training
from tests.test_own_loop import Layer
from titan_moe_lb.errors import JobError
from titan_moe_lb.own_loop.attach import attach
from titan_moe_lb.own_loop.routing_memory import positions_in_order
from titan_moe_lb.own_loop.routing_replay import RoutingReplay

ROLLOUT = [[10], [11, 12], [13, 14], [15, 16]]
TRAINING = [[16], [14, 13], [12, 15], [11]]
"""Shuffled, packed otherwise, and one sample left out."""
FLAGS = ["--module=deepseek_v3", "--config=deepseek_v3_tiny", "--debug.seed=0"]
FLAGS += ["--training.seq_len=64", "--optimizer.param_groups.0.optimizer_kwargs.lr=0.0"]
LAYOUTS = {
    "one process": (1, ["--training.local_batch_size=4"]),
    "PP2": (
        2,
        [
            "--training.local_batch_size=4",
            "--parallelism.pipeline_parallel_degree=2",
            "--parallelism.pipeline_parallel_schedule=Interleaved1F1B",
        ],
    ),
    "DP2, full AC": (2, ["--training.local_batch_size=2", "activation-checkpoint:full"]),
    "EP2": (2, ["--training.local_batch_size=2", "--parallelism.expert_parallel_degree=2"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_token_gets_the_experts_of_the_rollout(ranks, layout):
    num_ranks, flags = LAYOUTS[layout]
    answers = ranks.run(num_ranks, rollout_and_training, [*FLAGS, *flags], ROLLOUT, TRAINING)
    rollout, own, replayed = (
        {key: ids for rank in answers for key, ids in rank[name].items()}
        for name in ("rollout", "own", "replayed")
    )
    tokens = sum(LENGTHS.values())
    layers = {layer for layer, _sample, _position in rollout}
    assert len(rollout) == len(layers) * tokens
    assert len(replayed) == len(layers) * (tokens - LENGTHS[10])
    assert all(replayed[key] == rollout[key] for key in replayed)
    changed = np.mean([len(set(own[key]) - set(rollout[key])) / len(own[key]) for key in replayed])
    for rank in answers:
        assert changed > 0.3
        assert rank["metrics"]["moe/replay_changed_share"] == pytest.approx(changed, rel=0.02)
        assert rank["metrics"]["moe/replay_off_policy_steps"] == 0
        assert rank["bytes"] == 2 * 2 * rank["layers"] * tokens


def replaying():
    model = Layer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    balance = attach(model, optimizer)
    return model, optimizer, RoutingReplay(balance)


def test_steps_off_policy_are_counted_over_tokens():
    """Two samples of 3 and 5 tokens, recorded before the first step and after the second: in the
    fourth, 3 steps and 1 step ago."""
    model, optimizer, replay = replaying()
    first, second = torch.tensor([[1] * 3 + [-1] * 5]), torch.tensor([[2] * 5 + [-1] * 3])
    x = torch.randn(1, 8, 64)
    for ids in (first, second):
        with replay.record(), torch.no_grad():
            model(x, sample_ids=ids)
        for _ in range(2 if ids is first else 1):
            model(x).sum().backward()
            optimizer.step()
    with replay.replay():
        model(x, sample_ids=torch.tensor([[2] * 5 + [1] * 3])).sum().backward()
    metrics = replay.metrics()
    assert metrics["moe/replay_off_policy_steps"] == (5 * 1 + 3 * 3) / 8
    assert metrics["moe/replay_off_policy_steps_max"] == 3
    assert replay.metrics() == {}


def test_the_choice_of_another_engine_is_taken():
    model, _optimizer, replay = replaying()
    taken = [[3, 5], [0, 7], [6, 1]]
    replay.add(8, model.moe.router.layer, taken)
    ids = []
    model.moe.router.register_forward_hook(lambda *call: ids.append(call[-1][1]))
    with replay.replay():
        model(torch.randn(1, 8, 64), sample_ids=torch.tensor([[-1, 8, 8, 8, -1, -1, -1, -1]]))
    assert ids[0][0, 1:4].tolist() == taken
    replay.forget([8])
    assert replay.num_bytes == 0


def test_what_was_never_recorded_is_one_line():
    model, _optimizer, replay = replaying()
    x = torch.randn(1, 8, 64)
    with replay.replay():
        with pytest.raises(JobError, match=r"sample 5 was never recorded: score it under record"):
            model(x, sample_ids=torch.full((1, 8), 5))
        with pytest.raises(JobError, match=r"says nothing of its samples: call model\(tokens, sam"):
            model(x)
    with replay.record(), torch.no_grad():
        model(x, sample_ids=torch.tensor([[5] * 4 + [-1] * 4]))
    with replay.replay(), pytest.raises(JobError, match="for other positions than its 0 to 7"):
        model(x, sample_ids=torch.full((1, 8), 5))


def test_positions_are_counted_where_nobody_gives_them():
    _tokens, samples, positions = batch([[11, 12]])
    counted = positions_in_order(samples.numpy())
    assert (counted == positions.numpy()).all()

"""Tests of routing replay: each token gets its rollout's experts in training, however both are
packed."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from tests.support.own_loop_jobs import Layer
from tests.support.replay_jobs import (
    LENGTHS,
    batch,
    rollout_and_training,
    samples_that_change_ranks,
)
from titan_moe_lb.balancing.expert_bias import QuantileBias, SignBias
from titan_moe_lb.errors import JobError
from titan_moe_lb.own_loop.attach import attach
from titan_moe_lb.own_loop.routing_memory import Recording, RoutingMemory, positions_in_order
from titan_moe_lb.own_loop.routing_replay import RoutingReplay

ROLLOUT = [[10], [11, 12], [13, 14], [15, 16]]
TRAINING = [[16], [14, 13], [12, 15], [11]]
"""Packing that is shuffled, different, and without one sample."""
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


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_the_newest_recording_is_on_every_rank(ranks, num_ranks):
    """Every rank has the newest recording, wherever it was made.

    Ranks may have made any number of earlier recordings. A recording of which every rank has a part
    is assembled.
    """
    found = ranks.run(num_ranks, samples_that_change_ranks)
    for iteration in range(3):
        chosen = {}
        for rank in found:
            chosen |= rank["chosen"][iteration]
        for rank in found:
            assert rank["known"][iteration] == chosen
            assert rank["off_policy"][iteration] == 0


def replaying(**options):
    model = Layer(**options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    balance = attach(model, optimizer)
    return model, optimizer, RoutingReplay(balance)


def test_steps_off_policy_are_counted_over_tokens():
    """Two samples of 3 and 5 tokens are recorded before the first step and after the second.

    In the fourth step they are 3 steps and 1 step old.
    """
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
    assert metrics["moe/replay_own_choice_share"] == 0
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
        with pytest.raises(JobError, match=r"has no sample_ids: call model\(tokens, sam"):
            model(x)
    with replay.record(), torch.no_grad():
        model(x, sample_ids=torch.tensor([[5] * 4 + [-1] * 4]))
    with replay.replay(), pytest.raises(JobError, match="for other positions than its 0 to 7"):
        model(x, sample_ids=torch.full((1, 8), 5))


def test_positions_are_counted_where_nobody_gives_them():
    _tokens, samples, positions = batch([[11, 12]])
    counted = positions_in_order(samples.numpy())
    assert (counted == positions.numpy()).all()


def selected(model):
    """List to which every forward appends its experts, ``(B, L, K)``."""
    ids = []
    model.moe.router.register_forward_hook(lambda *call: ids.append(call[-1][1]))
    return ids


def test_a_sample_recorded_anew_is_that_alone():
    """The sample has 8 tokens first, and 5 tokens three optimizer steps later."""
    model, optimizer, replay = replaying()
    ids = selected(model)
    for length in (8, 5):
        with replay.record(), torch.no_grad():
            model(torch.randn(1, length, 64), sample_ids=torch.full((1, length), 3))
        for _ in range(3):
            model(torch.randn(1, 8, 64)).sum().backward()
            optimizer.step()
    recorded = ids[4]
    with replay.replay():
        model(torch.randn(1, 5, 64), sample_ids=torch.full((1, 5), 3)).sum().backward()
        assert torch.equal(ids[-1].sort().values, recorded.sort().values)
        with pytest.raises(JobError, match="sample 3 "):
            model(torch.randn(1, 8, 64), sample_ids=torch.full((1, 8), 3))
    assert replay.metrics()["moe/replay_off_policy_steps"] == 3
    assert replay.num_bytes == 5 * 2 * 2


def test_the_parts_of_a_recording_are_put_together():
    """The first half of a sample is recorded beside another sample, its second half before it."""
    model, _optimizer, replay = replaying()
    ids = selected(model)
    rows = torch.tensor([[4, 4, 5, 5]]), torch.tensor([[0, 1, 0, 1]])
    more = torch.tensor([[4, 4]]), torch.tensor([[2, 3]])
    with replay.record(), torch.no_grad():
        for samples, positions in (rows, more):
            x = torch.randn(*samples.shape, 64)
            model(x, sample_ids=samples, sample_positions=positions)
    recorded = torch.cat([ids[0][:, :2], ids[1]], dim=1)
    with replay.replay():
        model(torch.randn(1, 4, 64), sample_ids=torch.full((1, 4), 4))
    assert torch.equal(ids[-1].sort().values, recorded.sort().values)


RIGHT = [[0, 3], [1, 4], [7, 2]]


IDS = "expert_ids_TK"
CANNOT_BE_ADDED = [
    *((IDS, ids, IDS) for ids in ([[0], [1], [7]], [[0, 1, 2]] * 3, [0, 3], [[0, 3], [1]], None)),
    *((IDS, np.array(RIGHT, dtype=dtype), IDS) for dtype in (np.float32, bool)),
    (IDS, [[0, 3], [4, 4], [7, 2]], r"\[4, 4\] for token 1"),
    (IDS, [[0, 3], [1, 4], [8, 2]], r"\[8, 2\] for token 2"),
    (IDS, [[0, -1], [1, 4], [7, 2]], r"\[0, -1\] for token 0"),
    (IDS, [[-2, -2], [1, 4], [7, 2]], r"\[-2, -2\] for token 0"),
    (IDS, [[2**16, 3], [1, 4], [7, 2]], "for token 0"),
    ("layer", 0, "layer=0"),
    *(("sample", sample, f"sample={sample}") for sample in (-1, 8.5, "8")),
    *(("step", step, f"step={step}") for step in (1, -1)),
]


@pytest.mark.parametrize(("name", "value", "named"), CANNOT_BE_ADDED)
def test_what_cannot_be_added_is_one_line(name, value, named):
    model, _optimizer, replay = replaying()
    right = {"sample": 8, "layer": model.moe.router.layer, "expert_ids_TK": RIGHT}
    replay.add(**right)
    with pytest.raises(JobError, match=named):
        replay.add(**(right | {name: value}))
    ids = selected(model)
    with replay.replay():  # what was there before is still there
        model(torch.randn(1, 3, 64), sample_ids=torch.full((1, 3), 8))
    assert ids[0][0].tolist() == RIGHT


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int64, torch.tensor])
def test_integers_of_any_kind_can_be_added(kind):
    model, _optimizer, replay = replaying()
    replay.add(
        np.int64(8),
        model.moe.router.layer,
        torch.tensor(RIGHT) if kind is torch.tensor else np.array(RIGHT, dtype=kind),
    )
    ids = selected(model)
    with replay.replay():
        model(torch.randn(1, 3, 64), sample_ids=torch.full((1, 3), 8))
    assert ids[0][0].tolist() == RIGHT


def test_a_row_of_minus_one_chooses_itself():
    """An engine may return the experts of all tokens but the last; here, of one token in four."""
    model, optimizer, replay = replaying()
    ids, x = selected(model), torch.randn(1, 4, 64)
    samples = torch.full((1, 4), 8)
    model(x)
    replay.add(8, model.moe.router.layer, RIGHT)
    with replay.replay(), pytest.raises(JobError, match="sample 8 "):
        model(x, sample_ids=samples)
    replay.add(8, model.moe.router.layer, [*RIGHT, [-1, -1]])
    with replay.replay():
        model(x, sample_ids=samples).sum().backward()
    assert ids[1][0, :3].tolist() == RIGHT
    assert torch.equal(ids[1][0, 3].sort().values, ids[0][0, 3].sort().values)
    assert replay.metrics()["moe/replay_own_choice_share"] == 1 / 4
    optimizer.step()
    replay.add(8, model.moe.router.layer, [[-1, -1]] * 4)
    with replay.replay():
        model(x, sample_ids=samples).sum().backward()
    assert replay.metrics()["moe/replay_own_choice_share"] == 1


def test_a_balance_has_one_replay():
    model = Layer()
    balance = attach(model)
    RoutingReplay(balance)
    with pytest.raises(JobError, match="RoutingReplay already"):
        RoutingReplay(balance)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"sample_ids": torch.zeros(1, 8, dtype=torch.int64)}, "sample_ids"),
        ({"sample_ids": torch.zeros(16, dtype=torch.int64)}, "sample_ids"),
        ({"sample_ids": torch.zeros(2, 8)}, "sample_ids"),
        ({"sample_ids": [[0] * 8] * 2}, "sample_ids"),
        ({"sample_positions": torch.zeros(2, 7, dtype=torch.int64)}, "sample_positions"),
        ({"sample_positions": torch.arange(8).expand(2, 8) - 1}, "sample_positions"),
        ({"sample_ids": torch.zeros(2, 8, dtype=torch.int64)}, "sample_positions"),
    ],
    ids=["rows", "flat", "float", "list", "positions too short", "negative", "twice"],
)
def test_samples_that_cannot_be(arguments, named):
    model, _optimizer, replay = replaying()
    samples = torch.arange(2).unsqueeze(1).expand(2, 8)
    with replay.record(), torch.no_grad(), pytest.raises(JobError, match=named):
        model(torch.randn(2, 8, 64), **({"sample_ids": samples} | arguments))


def test_the_replayed_experts_move_the_bias():
    """All 8 tokens go to experts 0 and 1, so the mean is 2, and the signs are -1, -1 and six times
    1, with mean 0.5.

    The quantile rule uses the scores of the training forward instead.
    """
    x = torch.randn(1, 8, 64)
    model, optimizer, replay = replaying(expert_bias=SignBias.Config(speed=0.01))
    replay.add(8, model.moe.router.layer, [[0, 1]] * 8)
    with replay.replay():
        model(x, sample_ids=torch.full((1, 8), 8)).sum().backward()
    optimizer.step()
    expected = torch.tensor([-0.015] * 2 + [0.005] * 6)
    torch.testing.assert_close(model.moe.expert_bias_E, expected)
    biases = []
    for replays in (False, True):
        torch.manual_seed(0)
        model, optimizer, replay = replaying(expert_bias=QuantileBias.Config())
        replay.add(8, model.moe.router.layer, [[0, 1]] * 8)
        with replay.replay() if replays else nullcontext():
            model(x, sample_ids=torch.full((1, 8), 8)).sum().backward()
        optimizer.step()
        biases.append(model.moe.expert_bias_E.clone())
    assert biases[0].abs().max() > 0 and torch.equal(*biases)


def first(number):
    return Recording(finished_steps=0, number=number, step=0)


def experts_of(*positions):
    """Experts of two layers with one choice: the position, and 10 more in the second layer."""
    return np.array([[[p] for p in positions], [[10 + p] for p in positions]])


def test_layers_are_added_one_after_another():
    """A recording of 3 tokens is followed by one of 2: layer by layer, or one layer twice at
    once."""
    every = np.zeros((1, 2), dtype=np.int64), np.arange(2)[None]
    for order in ([(0, 3), (1, 3), (0, 2), (1, 2)], [(0, 3), (0, 2), (1, 3), (1, 2)]):
        memory = RoutingMemory(num_layers=2, top_k=1)
        for number, (layer, length) in enumerate(order):
            memory.add(first(number), 0, layer, np.full((length, 1), 10 * length + layer))
            if number == 2:
                with pytest.raises(JobError, match="sample 0 "):
                    memory.recall(*every)
        assert memory.recall(*every)[:, 0, :, 0].tolist() == [[20, 20], [21, 21]]
        with pytest.raises(JobError, match="sample 0 "):
            memory.recall(np.zeros((1, 3), dtype=np.int64), np.arange(3)[None])


@pytest.mark.parametrize("newer", [Recording(1, 1, 1), Recording(0, 6, 0)])
def test_a_later_step_and_then_more_recordings_win_on_every_rank(newer):
    older = Recording(finished_steps=0, number=5, step=0)
    memories = [RoutingMemory(num_layers=2, top_k=1) for _ in range(2)]
    for memory, recording, position in zip(memories, (older, newer), (3, 4), strict=True):
        memory.keep(recording, 7, np.array([0]), experts_of(position))
    known = [(dict(memory.recordings), dict(memory.experts)) for memory in memories]
    for memory in memories:
        memory.merge(known)
        assert memory.experts[7].ravel().tolist() == [4, 14] and memory.recordings == {7: newer}


def test_parts_of_several_ranks_are_put_together_and_older_ones_left_out():
    """One rank has positions 0 and 2, another 1 and 3; a third has an older recording."""
    memories = [RoutingMemory(num_layers=2, top_k=1) for _ in range(3)]
    for memory, recording, positions in zip(
        memories, [first(1), first(1), first(0)], [(0, 2), (1, 3), (0, 1, 2, 3, 4)], strict=True
    ):
        shift = 5 * (recording.number == 0)
        memory.keep(recording, 7, np.array(positions), experts_of(*positions) + shift)
    known = [(dict(memory.recordings), dict(memory.experts)) for memory in memories]
    for memory in memories:
        memory.merge(known)
        assert memory.experts[7][0, :, 0].tolist() == [0, 1, 2, 3]
        assert memory.experts[7][1, :, 0].tolist() == [10, 11, 12, 13]
        assert memory.experts[7].dtype == np.int16
        assert memory.recordings == {7: first(1)}

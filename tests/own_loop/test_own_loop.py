"""Tests of balance in own training loops: uneven, skipped and refused steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchtitan.config import ParallelismConfig
from torchtitan.models.deepseek_v3 import model_registry as torchtitans_registry

from examples.chat_data import write_chats
from tests.support.loop_model import MoELayers
from tests.support.own_loop_jobs import (
    Layer,
    as_the_trainer,
    padded_batch,
    plain_model,
    train_on_rows_of_another_number,
    unequal_micro_batches,
)
from titan_moe_lb.balancing.anticipatory_routing import Anticipatory
from titan_moe_lb.balancing.forced_routing import RoundRobin
from titan_moe_lb.balancing.losses import BatchWiseAuxLoss, RouterZLoss
from titan_moe_lb.balancing.recording.training_loop import TrainingLoop
from titan_moe_lb.balancing.router import routers_of
from titan_moe_lb.balancing.step_hook import wire_parts
from titan_moe_lb.errors import JobError
from titan_moe_lb.own_loop.attach import attach
from titan_moe_lb.parallel.rank_groups import Axis, RankGroups


@pytest.fixture(scope="module")
def whole(ranks):
    return ranks.run(1, padded_batch)[0]


CUTS = {
    "one rank": ([[[0, 1], [2], [3]]], ParallelismConfig(), {}),
    "one rank, other order": ([[[3], [1], [0], [2]]], ParallelismConfig(), {}),
    "two ranks, EP": (
        [[[0], [2]], [[1], [3]]],
        ParallelismConfig(data_parallel_shard_degree=2, expert_parallel_degree=2),
        {},
    ),
    "DistributedDataParallel": ([[[0], [2]], [[1], [3]]], None, {"ddp": True}),
}


@pytest.mark.parametrize("cut", CUTS)
def test_micro_batches_of_unequal_length_are_the_one_batch(ranks, whole, cut):
    """Four rows have their own numbers of tokens.

    A skipped step precedes, and forwards without training lie between.
    """
    by_rank, parallelism, options = CUTS[cut]
    for found in ranks.run(len(by_rank), unequal_micro_batches, by_rank, parallelism, **options):
        assert found["counts"] == whole["counts"]
        for name, expected in whole["gradients"].items():
            error = (found["gradients"][name] - expected).abs().max() / expected.abs().max()
            assert error <= 1e-5 or expected.abs().max() == 0, name
        for name in ("seq_load_balancing_loss", "importance_loss", "entropy_loss", "z_loss"):
            expected = whole["metrics"][f"moe/{name}"]
            assert found["metrics"][f"moe/{name}"] == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("padded", [False, True], ids=["text", "padded chats"])
def test_counts_are_those_of_the_trainer(ranks, tmp_path, padded):
    """The counts are equal bit for bit, over steps in which the bias moves."""
    flags = ["--module=deepseek_v3", "--config=deepseek_v3_tiny", "--debug.seed=0"]
    write_chats(tmp_path)
    chats = str(tmp_path) if padded else None
    ((theirs, ours),) = ranks.run(1, as_the_trainer, flags, 3, chats)
    assert ("padding_share" in theirs[0][2]) == padded
    assert [step[0] for step in theirs] == [step[0] for step in ours]
    assert [step[2] for step in theirs] == [step[2] for step in ours]
    assert theirs[0][0] != theirs[2][0]
    for (_counts, expected, _of_step), (_same, figures, _its) in zip(theirs, ours, strict=True):
        assert figures.keys() == expected.keys()
        for name, values in figures.items():
            assert values == pytest.approx(expected[name], rel=1e-6, abs=1e-9)


def step(model, rows=2):
    model(torch.randn(rows, 8, 64)).sum().backward()


def z_loss(**options):
    return RouterZLoss.Config(weight=1e-3, **options)


def loop(**options):
    model = Layer(z_loss())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, attach(model, optimizer, **options)


def test_every_step_counts_its_own():
    """The metrics average over the micro-batches that ran; with per-layer metrics, every layer has
    a name."""
    model, optimizer, balance = loop()
    for forwards in (1, 3):
        balance.begin_step(2 * forwards)
        for _ in range(forwards):
            step(model)
        optimizer.step()
        load = balance.load()
        assert load.counts_ME.sum() == forwards * 2 * 8 * 2
    metrics = balance.metrics(per_layer=True)
    assert metrics["moe/z_loss_layer_3"] == metrics["moe/z_loss"] > 0
    assert metrics["moe/avg_overload_factor"] == 1


def test_rows_have_to_be_known_and_true():
    model, optimizer, balance = loop()
    with pytest.raises(JobError, match=r"call begin_step\(rows\) before its first forward"):
        step(model)
    balance.begin_step(4)
    step(model)
    with pytest.raises(JobError, match="the step had 2 rows and announced 4"):
        optimizer.step()
    balance.begin_step(2)
    step(model)
    with pytest.raises(JobError, match="4 rows on this rank and announced 2 on all"):
        step(model)
    balance.begin_step(2)
    step(model)
    optimizer.step()
    assert balance.load().counts_ME.sum() == 2 * 8 * 2


def test_more_forwards_than_announced():
    model, _optimizer, balance = loop(max_micro_batches=2)
    balance.begin_step(6)
    step(model)
    step(model)
    with pytest.raises(JobError, match=r"forward 3 of one optimizer step.*max_micro_batches"):
        step(model)


def test_more_forwards_of_a_pipeline_join_the_last():
    model = MoELayers()
    for router in routers_of([model]):
        router.config.loop = TrainingLoop(num_micro_batches=2, varying=True)
    hook = wire_parts([model], RankGroups(stages=Axis(rank=0, size=2)))
    for _ in range(3):
        step(model)
    hook.close_step()
    record = routers_of([model])[0].step_record
    assert record.step_counts_NMSE[0, :, 0].sum(-1).tolist() == [2 * 8 * 2, 2 * 2 * 8 * 2]


def test_rows_of_a_job_are_forgotten():
    """The config is bound to the rows of a job, and the loop announces other rows."""
    model = MoELayers([RouterZLoss.Config(weight=1.0)])
    for router in routers_of([model]):
        router.aux_losses["z_loss"].config.local_batch_size = 8
    balance = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), rows_per_step=2)
    step(model)
    balance.close_step()
    assert balance.metrics()["moe/z_loss"] > 0


def test_a_loss_of_the_whole_batch_is_refused_in_parts():
    model = Layer(BatchWiseAuxLoss.Config(weight=1e-3))
    balance = attach(model)
    balance.begin_step(4)
    step(model)
    with pytest.raises(JobError, match="batch_wise .* is no sum over micro-batches"):
        step(model)


def test_a_scaled_loss_scales_the_balance():
    model = Layer(z_loss())
    balance = attach(model)
    x = torch.randn(2, 8, 64)
    gradients = []
    for loss_scale in (1.0, 1024.0):
        model.zero_grad()
        balance.begin_step(2, loss_scale=loss_scale)
        (0.0 * model(x)).sum().backward()
        gradients.append(model.moe.router.gate.weight.grad.clone())
    torch.testing.assert_close(gradients[1], 1024 * gradients[0])


def test_a_batch_that_a_job_has_not_announced_is_refused(ranks):
    """Without the refusal, twice the sequences would silently double the loss, also in a
    pipeline."""
    for num_ranks, flags in ((1, []), (2, ["--parallelism.pipeline_parallel_degree=2"])):
        with pytest.raises(RuntimeError, match="micro-batches of . sequences and get 6"):
            ranks.run(num_ranks, train_on_rows_of_another_number, flags)


def padded_forward():
    loop(rows_per_step=2)[0](torch.randn(2, 8, 64), valid_tokens=torch.ones(2, 8, dtype=torch.bool))


REFUSED = {
    "attach(gradients='average')": lambda: loop(gradients="average"),
    "attach(rows_per_step) is 0": lambda: loop(rows_per_step=0),
    "attach(rows_per_step) is '4'": lambda: loop(rows_per_step="4"),
    "attach(max_micro_batches) is 0": lambda: loop(max_micro_batches=0),
    "attach(finished_steps) is -1": lambda: loop(finished_steps=-1),
    "attach(seen_tokens) is 2.5": lambda: loop(seen_tokens=2.5),
    "attach(optimizer) is a list": lambda: attach(MoELayers(), []),
    "attach(optimizer) is a str": lambda: attach(MoELayers(), "adam"),
    "attach(..., padded=True)": padded_forward,
    "begin_step(rows) is 0": lambda: loop()[2].begin_step(0),
    "begin_step(loss_scale) is 0.0": lambda: loop()[2].begin_step(2, loss_scale=0.0),
    "begin_step(loss_scale) is nan": lambda: loop()[2].begin_step(2, loss_scale=float("nan")),
    "begin_step(loss_scale) is inf": lambda: loop()[2].begin_step(2, loss_scale=float("inf")),
    "metrics() after optimizer.step()": lambda: loop(rows_per_step=2)[2].metrics(),
    "has its training loop already": lambda: attach(loop()[0]),
    "Linear has no MoE layer": lambda: attach(nn.Linear(2, 2)),
    "is a TokenChoiceTopKRouter": lambda: attach(
        nn.Sequential(torchtitans_registry("debugmodel").model.layers[-1].moe.build())
    ),
    "balanced(routing=...)": lambda: attach(plain_model(routing=Anticipatory.Config(delay=1))),
    "needs torchtitan's Trainer": lambda: Layer(forced_routing=RoundRobin.Config()),
}


@pytest.mark.parametrize("named", REFUSED)
def test_refused_in_one_line(named):
    with pytest.raises(JobError) as error:
        REFUSED[named]()
    assert named in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_quantized_gate_is_refused(dtype):
    model = plain_model()
    gate = routers_of([model])[-1].gate
    gate.weight = torch.nn.Parameter(gate.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(JobError, match="quantized"):
        attach(model, rows_per_step=2)

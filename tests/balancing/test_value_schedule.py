"""Tests of weights and speeds that change during training: step, resume, no recompilation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.host_reads import RefuseHostReads
from tests.support.own_loop_jobs import Layer, steps_of_unequal_ranks
from tests.support.train_jobs import train, train_config
from titan_moe_lb.balancing.expert_bias import SignBias
from titan_moe_lb.balancing.losses import RouterZLoss
from titan_moe_lb.balancing.router import routers_of
from titan_moe_lb.balancing.value_schedule import Change, check_changes, value_at
from titan_moe_lb.errors import JobError
from titan_moe_lb.job import job_config
from titan_moe_lb.own_loop.attach import attach
from titan_moe_lb.rules import validate_here

TINY = ["--config", "deepseek_v3_tiny", "--training.seq_len=64", "--training.local_batch_size=2"]
SAVED = ["--checkpoint.enable", "--checkpoint.no-last-save-model-only"]
CP2 = ["--parallelism.context_parallel_degree=2", "--training.seq_len=256"]


def z_loss(*changes: str) -> str:
    """Flag of a z-loss with weight 0.5 and changes."""
    return f'--model.aux_losses=[{{type="z_loss", weight=0.5, changes=[{", ".join(changes)}]}}]'


LOSSES = z_loss("{step = 3, value = 0.125}", "{step = 4, value = 0.0}")
RAMP = z_loss('{step = 1, until = 3, value = 0.25, shape = "linear"}', "{step = 4, value = 0.0}")


def test_value_at_by_hand():
    """The change at step 3 acts in step 3.

    The change after 100 tokens acts in the first step that begins with 100 seen tokens.
    """
    by_step = [Change(value=0.5, step=3), Change(value=0.0, step=5)]
    assert [value_at(1.0, by_step, step, 0) for step in range(1, 7)] == [1, 1, 0.5, 0.5, 0, 0]
    by_tokens = [Change(value=0.25, tokens=100)]
    assert [value_at(1.0, by_tokens, 9, seen) for seen in (0, 99, 100, 101)] == [1, 1, 0.25, 0.25]
    assert value_at(1.0, [], 10**9, 10**18) == 1.0


@pytest.mark.parametrize("unit", ["step", "tokens"])
def test_gradual_changes_by_hand(unit):
    """From 1 to 0.2 between 10 and 20, and along a cosine to 0.6 between 30 and 50."""
    changes = [
        Change(value=0.2, shape="linear", until=20, **{unit: 10}),
        Change(value=0.6, shape="cosine", until=50, **{unit: 30}),
    ]
    check_changes("aux loss", changes)
    times = np.array([1, 9, 10, 11, 15, 19, 20, 25, 30, 31, 35, 40, 45, 49, 50, 51, 10**6])
    along_cosine = 0.4 - 0.2 * np.cos(np.pi * np.interp(times, [30, 50], [0, 1]))
    expected = np.where(times < 30, np.interp(times, [10, 20], [1, 0.2]), along_cosine)
    found = [
        value_at(1.0, changes, time if unit == "step" else 9, time if unit == "tokens" else 9)
        for time in times.tolist()
    ]
    assert found == pytest.approx(expected.tolist(), abs=1e-15)
    assert [found[0], found[6], found[14]] == [1.0, 0.2, 0.6]


@pytest.mark.parametrize(
    "changes",
    [
        [{"value": 0.0, "step": 5, "shape": "linear"}],
        [{"value": 0.0, "step": 5, "until": 9}],
        [{"value": 0.0, "step": 5, "until": 9, "shape": "square"}],
        [{"value": 0.0, "step": 5, "until": 5, "shape": "linear"}],
        [{"value": 0.0, "step": 5, "until": 4, "shape": "cosine"}],
        [{"value": 0.0, "tokens": 8e9, "until": 7e9, "shape": "cosine"}],
        [{"value": 0.0, "tokens": 8e9, "until": float("inf"), "shape": "linear"}],
        [{"value": 0.0, "step": 5, "until": 9, "shape": "linear"}, {"value": 1.0, "step": 8}],
        [{"value": 0.0, "step": 5}, {"value": 1.0, "step": 5}],
        [{"value": 0.0, "tokens": 9e9}, {"value": 1.0, "tokens": 8e9}],
        [{"value": 0.0}],
        [{"value": 0.0, "step": 1, "tokens": 1}],
        [{"value": 0.0, "step": 2}, {"value": 1.0, "tokens": 3}],
        [{"value": -1.0, "step": 2}],
        [{"value": float("nan"), "step": 2}],
        [{"value": 1.0, "step": 0}],
    ],
    ids=str,
)
def test_a_schedule_that_makes_no_sense_is_refused(changes):
    changes = [Change(**change) for change in changes]
    for config, arguments in ((RouterZLoss.Config, {"weight": 1.0}), (SignBias.Config, {})):
        with pytest.raises(JobError, match="changes"):
            config(changes=changes, **arguments)


def test_message_names_the_key_of_the_job():
    table = '{type = "sign", changes = [{step = 5, value = 0}, {step = 4, value = 1}]}'
    with pytest.raises(JobError, match=r"--model expert_bias: .*changes"):
        job_config.load([*TINY, f"--model.expert_bias={table}"])


def weights_and_compilations(
    arguments: list[str], first_step: int = 1
) -> tuple[list[float], list[int]]:
    """Return the weight that the backward of each step used, and the number of compiled graphs so
    far."""
    config = job_config.load(arguments).config
    config.metrics.write_moe_trace = False
    weights, compilations = [], []

    def note(trainer):
        step = trainer.train_step

        def train_step(*args, **kwargs):
            (weight, *_) = routers_of(trainer.model_parts)[0].record.weights_A.tolist()
            dims = trainer.parallel_dims
            rows = config.training.local_batch_size * dims.dp_replicate * dims.dp_shard
            weights.append(weight * rows)  # a mean over the rows
            step(*args, **kwargs)
            compilations.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

        trainer.train_step = train_step

    train_config(config, first_step=first_step, prepare=note)
    return weights, compilations


@pytest.mark.parametrize(
    ("losses", "expected"), [(LOSSES, [0.5, 0.5, 0.125, 0.0]), (RAMP, [0.5, 0.375, 0.25, 0.0])]
)
def test_a_weight_changes_without_compiling_blocks_anew(ranks, losses, expected):
    flags = ["--training.steps=4", "--compile.enable", "--compile.backend=aot_eager", losses]
    flags += [
        '--model.expert_bias={type="sign", changes=[{step=2, until=4, value=0, shape="cosine"}]}'
    ]
    ((weights, compilations),) = ranks.run(1, weights_and_compilations, [*TINY, *flags])
    assert weights == expected
    assert compilations[0] > 0 and len(set(compilations)) == 1


def test_a_resumed_run_continues_the_schedule(ranks, tmp_path):
    """The resumed run equals the undisturbed one bit for bit, across the change at step 3."""
    flags = [*TINY, *SAVED, LOSSES, "--debug.seed=1", "--debug.deterministic"]
    flags += ["--checkpoint.interval=2", "--lr_scheduler.total_steps=4"]
    (whole,) = ranks.run(1, train, [*flags, "--training.steps=4", f"--dump_folder={tmp_path}/a"])
    folder = f"--dump_folder={tmp_path}/b"
    (first,) = ranks.run(1, train, [*flags, "--training.steps=2", folder])
    (second,) = ranks.run(1, train, [*flags, "--training.steps=4", folder], first_step=3)
    numbers = [
        [(s["loss_metrics/global_avg_loss"], s["grad_norm"]) for s in run]
        for run in (whole, first + second)
    ]
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize(
    ("num_ranks", "tokens", "flags"), [(1, 1024, []), (2, 2048, []), (2, 4096, CP2)]
)
def test_another_batch_size_moves_no_change(ranks, tmp_path, num_ranks, tokens, flags):
    """4 steps have 2 rows on each data rank, later steps 8.

    Step 5 begins with 8 rows seen, and step 6 with 16, the position of the change. torchtitan's
    checkpoint counts the tokens of one rank.
    """
    flags = [*TINY, *SAVED, *flags, z_loss(f"{{tokens = {tokens}, value = 0.125}}")]
    flags += ["--checkpoint.interval=4", "--lr_scheduler.total_steps=7"]
    flags += [f"--dump_folder={tmp_path}"]
    first = ranks.run(num_ranks, weights_and_compilations, [*flags, "--training.steps=4"])
    more = [*flags, "--training.steps=7", "--training.local_batch_size=8"]
    second = ranks.run(num_ranks, weights_and_compilations, more, first_step=5)
    for rank in range(num_ranks):
        assert first[rank][0] == [0.5] * 4
        assert second[rank][0] == [0.5, 0.125, 0.125]


def test_tokens_of_other_ranks_are_refused(ranks, tmp_path):
    """A rank counts its own tokens; context parallelism splits tokens without other data."""
    flags = [*TINY, *SAVED, f"--dump_folder={tmp_path}", "--training.seq_len=256"]
    after_tokens = z_loss("{tokens = 1024, value = 0.125}")
    ranks.run(2, weights_and_compilations, [*flags, after_tokens, "--training.steps=1"])
    flags += ["--training.steps=2"]
    split = [*flags, "--parallelism.context_parallel_degree=2"]
    again = [*flags, "--checkpoint.exclude_from_loading=dataloader"]
    for job, processes in ((split, 4), (again, 1)):
        with pytest.raises(JobError, match="tokens"):
            validate_here(job_config.load([*job, after_tokens], processes))
        validate_here(job_config.load([*job, LOSSES], processes))
    validate_here(job_config.load([*flags, after_tokens], 2))


def loop_with_a_change(optimizer=None, **options):
    """Loop with a z-loss of weight 0.5, and 0.125 after 40 tokens."""
    changes = [Change(tokens=40, value=0.125)]
    model = Layer(RouterZLoss.Config(weight=0.5, changes=changes))
    return model, attach(model, optimizer, **options)


def weight_of_step(model, balance, rows=2):
    """Weight of a step with micro-batches of two rows of 8 tokens, as a mean over rows."""
    for _ in range(rows // 2):
        model(torch.randn(2, 8, 64)).sum().backward()
    (weight,) = model.moe.router.record.weights_A.tolist()
    balance.close_step()
    return rows * weight


def test_an_own_loop_counts_the_tokens_of_its_steps():
    """The steps have 16 and 32 tokens, one is skipped, and a checkpoint has 48."""
    model, balance = loop_with_a_change()
    weights = []
    for rows in (2, 4, 2):
        balance.begin_step(rows)
        weights.append(weight_of_step(model, balance, rows))
        if rows == 2:
            balance.begin_step(2)
            model(torch.randn(2, 8, 64))
            balance.skip_step()
    assert weights == [0.5, 0.5, 0.125]
    assert balance.seen_tokens == 64
    for seen, expected in ((39, 0.5), (40, 0.125)):
        model, balance = loop_with_a_change(seen_tokens=seen, rows_per_step=2)
        assert weight_of_step(model, balance) == expected
        assert balance.seen_tokens == seen + 16


def test_rows_of_every_step_are_announced_once():
    model, balance = loop_with_a_change(rows_per_step=2)
    assert [weight_of_step(model, balance) for _ in range(4)] == [0.5] * 3 + [0.125]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"step": 1, "until": 4, "shape": "linear"}, [0.3, 0.2, 0.1, 0.0]),
        ({"tokens": 16, "until": 48, "shape": "cosine"}, [0.3, 0.3, 0.15, 0.0]),
    ],
    ids=str,
)
def test_a_speed_falls_gradually(change, expected):
    """The speed of a step is the length of its update along the signs, in steps of 16 tokens."""
    model = Layer(expert_bias=SignBias.Config(speed=0.3, changes=[Change(value=0.0, **change)]))
    balance = attach(model)
    speeds = []
    for _ in expected:
        model(torch.randn(2, 8, 64)).sum().backward()
        before = model.moe.expert_bias_E.clone()
        counts_E = model.moe.router.record.counts_MSE[:, 0].sum(0)
        balance.close_step()
        signs = torch.sign(counts_E.double().mean() - counts_E)
        moved = model.moe.expert_bias_E - before
        direction = (signs - signs.mean()).float()
        speeds.append(float(moved @ direction / (direction @ direction)))
    assert speeds == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("change", [{"tokens": 32}, {"step": 3}], ids=str)
def test_the_bias_rests_from_the_change_of_its_speed_to_0(change):
    """This is DeepSeek-V3's second phase, in a loop of 16 tokens a step without a loss."""
    changes = [Change(value=0, **change)]
    model = Layer(expert_bias=SignBias.Config(speed=0.1, changes=changes))
    balance = attach(model)
    biases = []
    for _ in range(4):
        model(torch.randn(2, 8, 64)).sum().backward()
        balance.close_step()
        biases.append(model.moe.expert_bias_E.clone())
    assert biases[0].abs().max() > 0 and not torch.equal(biases[0], biases[1])
    assert torch.equal(biases[1], biases[2]) and torch.equal(biases[2], biases[3])


def test_tokens_are_those_of_all_ranks(ranks):
    """16 tokens of one rank and 48 of the other are 64 a step, so the change after 128 acts in step
    3.

    If only one rank changed its bias, the biases would differ.
    """
    (weights, bias), *others = ranks.run(2, steps_of_unequal_ranks)
    assert weights == [0.5, 0.5, 0.125, 0.125]
    assert others == [(weights, bias)]


def test_tokens_are_read_between_two_steps():
    model, balance = loop_with_a_change()
    for _ in range(4):
        balance.begin_step(2)
        with RefuseHostReads():
            model(torch.randn(2, 8, 64)).sum().backward()
            balance.close_step()
    assert balance.seen_tokens == 64


def test_tokens_without_a_change_after_tokens_are_not_counted():
    balance = attach(Layer(RouterZLoss.Config(weight=0.5)))
    with pytest.raises(JobError, match="changes"):
        balance.seen_tokens  # noqa: B018

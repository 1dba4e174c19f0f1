"""Weights and speeds that change during training: when, from where, and without compiling anew."""

from __future__ import annotations

import pytest
import torch

from tests.telemetry_jobs import forward_and_backward, moe_layers
from tests.train_jobs import train, train_config
from titan_moe_lb.errors import JobError
from titan_moe_lb.expert_bias import SignBias
from titan_moe_lb.job import job_config
from titan_moe_lb.losses import RouterZLoss
from titan_moe_lb.router import routers_of
from titan_moe_lb.step_hook import StepHook, wire
from titan_moe_lb.value_schedule import Change, value_at

TINY = ["--config", "deepseek_v3_tiny", "--training.seq_len=64", "--training.local_batch_size=2"]


def test_value_at_by_hand():
    """The change at step 3 acts in step 3; the one after 100 tokens in the first step that
    begins with 100 seen."""
    by_step = [Change(value=0.5, step=3), Change(value=0.0, step=5)]
    assert [value_at(1.0, by_step, step, 0) for step in range(1, 7)] == [1, 1, 0.5, 0.5, 0, 0]
    by_tokens = [Change(value=0.25, tokens=100)]
    assert [value_at(1.0, by_tokens, 9, seen) for seen in (0, 99, 100, 101)] == [1, 1, 0.25, 0.25]
    assert value_at(1.0, [], 10**9, 10**18) == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([Change(value=0.0, step=5), Change(value=1.0, step=5)], "step 5 does not come after 5"),
        (
            [Change(value=0.0, tokens=9e9), Change(value=1.0, tokens=8e9)],
            "put the changes in order",
        ),
        ([Change(value=0.0)], "needs either step or tokens"),
        ([Change(value=0.0, step=1, tokens=1)], "needs either step or tokens"),
        ([Change(value=0.0, step=2), Change(value=1.0, tokens=3)], "not in both"),
        ([Change(value=-1.0, step=2)], "value -1.0 must be a finite number of at least 0"),
        ([Change(value=float("nan"), step=2)], "must be a finite number"),
        ([Change(value=1.0, step=0)], "is before training begins"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_one_line(changes, message):
    for component in (RouterZLoss.Config, SignBias.Config):
        arguments = {"weight": 1.0} if component is RouterZLoss.Config else {}
        with pytest.raises(JobError, match=message):
            component(changes=changes, **arguments)


def test_message_names_the_place_in_the_job(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    table = '{type = "sign", changes = [{step = 5, value = 0}, {step = 4, value = 1}]}'
    with pytest.raises(JobError, match=r"--model expert_bias: .*step 4 does not come after 5"):
        job_config.load([*TINY, f"--model.expert_bias={table}"])


def test_bias_stands_still_from_the_step_on_that_says_so():
    """DeepSeek-V3's second phase: speed 0 with the bias kept."""
    (layer,) = layers = moe_layers([0])
    config = layer.router.expert_bias.config
    config.changes = [Change(value=0.0, step=3)]
    hook = StepHook(layers, wire([layer.router], None), None)
    seen = []
    for _ in range(4):
        forward_and_backward(layers)
        hook.close_step()
        seen.append(layer.expert_bias_E.clone())
    assert seen[0].abs().max() > 0 and not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[2]) and torch.equal(seen[2], seen[3])


LOSSES = (
    '--model.aux_losses=[{type = "z_loss", weight = 0.5, changes = [{step = 3, value = 0.125}, '
    "{step = 4, value = 0.0}]}]"
)


def weights_and_compilations(arguments: list[str]) -> tuple[list[float], list[int]]:
    """By step: the weight that its backward used, and the graphs compiled so far. One rank."""
    config = job_config.load(arguments).config
    config.metrics.write_moe_trace = False
    weights, compilations = [], []

    def note(trainer):
        step = trainer.train_step

        def train_step(*args, **kwargs):
            (weight, *_) = routers_of(trainer.model_parts)[0].record.weights_A.tolist()
            weights.append(weight * config.training.local_batch_size)  # a mean over the rows
            step(*args, **kwargs)
            compilations.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

        trainer.train_step = train_step

    train_config(config, prepare=note)
    return weights, compilations


def test_a_weight_changes_without_compiling_blocks_anew(ranks):
    flags = ["--training.steps=4", "--compile.enable", "--compile.backend=aot_eager", LOSSES]
    ((weights, compilations),) = ranks.run(1, weights_and_compilations, [*TINY, *flags])
    assert weights == [0.5, 0.5, 0.125, 0.0]
    assert compilations[0] > 0 and len(set(compilations)) == 1


def test_a_resumed_run_takes_up_the_schedule(ranks, tmp_path):
    """And is the undisturbed run, bit for bit, across the change at step 3."""
    flags = [*TINY, LOSSES, "--debug.seed=1", "--debug.deterministic", "--checkpoint.enable"]
    flags += ["--checkpoint.interval=2", "--lr_scheduler.total_steps=4"]
    flags += ["--checkpoint.no-last-save-model-only"]
    (whole,) = ranks.run(1, train, [*flags, "--training.steps=4", f"--dump_folder={tmp_path}/a"])
    folder = f"--dump_folder={tmp_path}/b"
    (first,) = ranks.run(1, train, [*flags, "--training.steps=2", folder])
    (second,) = ranks.run(1, train, [*flags, "--training.steps=4", folder], first_step=3)
    numbers = [
        [(s["loss_metrics/global_avg_loss"], s["grad_norm"]) for s in run]
        for run in (whole, first + second)
    ]
    assert numbers[0] == numbers[1]

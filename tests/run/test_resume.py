"""Tests of resumed runs: the same numbers and bias, or a refusal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.support.bias_jobs import biases_of_a_run
from tests.support.resumed_jobs import (
    FROZEN,
    JOB,
    RESET,
    SIGN,
    bias_job,
    files_of,
    refusal,
)
from tests.support.saved_tensors import tensors
from tests.support.train_jobs import next_inputs, train
from titan_moe_lb.checkpoints.resume_point import read_metadata
from titan_moe_lb.wiring.bias_on_resume import MARKER


def test_resumed_run_continues_bitwise(ranks, tmp_path):
    whole, stopped = ([*JOB, f"--dump_folder={tmp_path / name}"] for name in ("whole", "stopped"))
    expected = ranks.run(2, train, whole)[0]
    # The learning-rate schedule is that of four steps in both halves.
    half = ["--training.steps=2", "--lr_scheduler.total_steps=4"]
    first = ranks.run(2, train, [*stopped, *half])[0]
    second = ranks.run(2, train, stopped, first_step=3)[0]
    names = ("loss_metrics/global_avg_loss", "grad_norm", "moe/global_load_balancing_loss")
    for name in names:
        assert [step[name] for step in expected] == [step[name] for step in [*first, *second]]
    assert expected[2][names[2]] != expected[3][names[2]]
    found = tensors(tmp_path / "stopped", 4)
    counts = [name for name in found if name.endswith("load_E")]
    assert len(counts) == 3 and all(found[name].sum() > 0 for name in counts)
    for name, tensor in tensors(tmp_path / "whole", 4).items():
        assert torch.equal(found[name], tensor), name


def test_frozen_keeps_the_bits_of_a_learned_bias(ranks, learned, run, tmp_path):
    again = shutil.copytree(run, tmp_path / "again")
    files_of(run, FROZEN)
    found = ranks.run(2, biases_of_a_run, bias_job(run, FROZEN))[0]
    assert torch.equal(found["loaded"], learned[1])
    assert torch.equal(found["trained"], learned[1])
    moved = ranks.run(2, biases_of_a_run, bias_job(again, SIGN))[0]
    assert torch.equal(moved["loaded"], learned[1])
    assert not torch.equal(moved["trained"], learned[1])


def test_a_rule_that_remembers_takes_over_from_one_that_does_not(ranks, learned, run):
    """Two steps of momentum follow two of the sign rule, and two more follow from its own
    checkpoint."""
    momentum = bias_job(run, '{type = "momentum"}')
    first = ranks.run(2, biases_of_a_run, momentum)[0]
    assert torch.equal(first["loaded"], learned[1])
    assert not torch.equal(first["trained"], learned[1])
    saved = read_metadata(run / "checkpoint" / "step-4").state_dict_metadata
    assert sum("expert_bias.momentum_E" in name for name in saved) == 3
    longer = ["--training.steps=6", "--lr_scheduler.total_steps=4"]
    again = ranks.run(2, biases_of_a_run, [*momentum, *longer])[0]
    assert torch.equal(again["loaded"], first["trained"])


def test_reset_is_taken_once(ranks, run):
    """A restart before the next checkpoint resets again, a restart after it does not."""
    rule = '{type = "sign", speed = 0.01, reset = true}'
    files_of(run, rule)
    job = bias_job(run, rule)
    stopped = [*job, "--training.steps=3", "--checkpoint.load_only"]
    for arguments in (stopped, job):
        found = ranks.run(2, biases_of_a_run, arguments)[0]
        assert found["loaded"].abs().max() == 0
        assert found["trained"].abs().max() >= 0.01
        assert json.loads((run / "checkpoint" / MARKER).read_text()) == {"step": 2}
    on = ranks.run(2, biases_of_a_run, [*job, "--training.steps=5"])[0]
    assert torch.equal(on["loaded"], found["trained"])
    assert json.loads((run / "checkpoint" / MARKER).read_text()) == {"step": 2}


def test_reset_of_weights_from_another_run_is_taken_once(ranks, learned, tmp_path):
    initial = f"--checkpoint.initial_load_path={learned[0]}/checkpoint/step-2"
    job = [*bias_job(tmp_path, RESET), initial, "--checkpoint.interval=1"]
    found = ranks.run(2, biases_of_a_run, [*job, "--training.steps=1"])[0]
    assert found["loaded"].abs().max() == 0
    sign = [*bias_job(tmp_path, SIGN), initial, "--training.steps=2"]
    moved = ranks.run(2, biases_of_a_run, sign)[0]["trained"]
    on = ranks.run(2, biases_of_a_run, [*job, "--training.steps=3"])[0]
    assert moved.abs().max() > 0 and torch.equal(on["loaded"], moved)


def test_checkpoint_without_the_loss_is_refused_in_one_line(learned, tmp_path):
    """torchtitan's loader would fail with a traceback about a missing key."""
    losses = ["--model.aux_losses", JOB[3]]
    initial = f"--checkpoint.initial_load_path={learned[0]}/checkpoint/step-2"
    for folder, flags in ((learned[0], []), (tmp_path, [initial])):
        assert "global-batch loss" in refusal(folder, SIGN, *losses, *flags)


def test_dropping_or_missing_a_bias_is_one_line(ranks, learned, tmp_path):
    message = refusal(learned[0], "none")
    for text in ("layers.1.moe.expert_bias_E", FROZEN, RESET):
        assert text in message
    ranks.run(2, train, [*bias_job(tmp_path, "none"), "--training.steps=2"])
    files_of(tmp_path, "none")
    for rule in (SIGN, FROZEN, RESET):
        assert '"none"' in refusal(tmp_path, rule)


def layout(**degrees: int) -> list[str]:
    """Flags of a layout."""
    degrees = {"data_parallel_shard": 1, "expert_parallel": 1} | degrees
    flags = [f"--parallelism.{name}_degree={degree}" for name, degree in degrees.items()]
    # Flex attention wants whole blocks of a row on every rank.
    return [*flags, *(["--training.seq_len=256"] if "context_parallel" in degrees else [])]


BEGIN_AGAIN = ["--checkpoint.exclude_from_loading", "dataloader"]


@pytest.mark.parametrize(
    ("processes", "degrees"),
    [
        (1, {}),
        (2, {"tensor_parallel": 2}),
        (2, {"context_parallel": 2}),
        (4, {"data_parallel_shard": 4}),
        (4, {"data_parallel_shard": 2, "data_parallel_replicate": 2}),
    ],
    ids=str,
)
def test_another_number_of_data_ranks_is_refused_before_the_start(learned, processes, degrees):
    """Two ranks saved ``learned``."""
    folder, flags, nowhere = learned[0], layout(**degrees), Path("/nowhere")
    assert "exclude_from_loading" in refusal(folder, SIGN, *flags, ranks=processes)
    files_of(folder, SIGN, *flags, *BEGIN_AGAIN, ranks=processes)
    # Weights of another run bring no place in the data.
    initial = [*flags, f"--checkpoint.initial_load_path={folder}/checkpoint/step-2"]
    files_of(nowhere, SIGN, *initial, ranks=processes)
    whole = "--checkpoint.no-initial_load_model_only"
    assert "exclude_from_loading" in refusal(nowhere, SIGN, *initial, whole, ranks=processes)


@pytest.mark.parametrize(
    ("processes", "degrees"),
    [
        (2, {"data_parallel_replicate": 2}),
        (4, {"data_parallel_shard": 2, "pipeline_parallel": 2}),
        (4, {"data_parallel_shard": 2, "tensor_parallel": 2}),
    ],
    ids=str,
)
def test_as_many_data_ranks_in_another_layout_go_on_with_the_same_data(
    ranks, run, processes, degrees
):
    flags = layout(**degrees)
    files_of(run, SIGN, *flags, ranks=processes)
    job = [*bias_job(run, SIGN), "--training.steps=9"]
    expected = ranks.run(2, next_inputs, job)
    found = ranks.run(processes, next_inputs, [*job, *flags])
    assert not torch.equal(expected[0], expected[1])
    assert {tuple(one.tolist()) for one in found} == {tuple(one.tolist()) for one in expected}


def test_excluded_data_begin_again_on_another_number_of_ranks(ranks, run, tmp_path):
    job = [*bias_job(run, SIGN), *layout(), "--training.steps=9"]
    fresh = ranks.run(1, next_inputs, [*job, f"--dump_folder={tmp_path}/fresh"])[0]
    assert torch.equal(ranks.run(1, next_inputs, [*job, *BEGIN_AGAIN])[0], fresh)

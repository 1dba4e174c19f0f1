"""Tests of TensorBoard, W&B and the trace: the logged numbers, and those of a validation loop."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.sink_files import tensorboard, wandb
from tests.support.sink_jobs import train_into_sinks
from titan_moe_lb.traces.trace import read_trace

LOSSES = (
    '--model.aux_losses=[{type = "sequence_wise", weight = 1e-3}, {type = "z_loss", weight = 1e-3}]'
)
TINY = ["--module", "deepseek_v3", "--config", "deepseek_v3_tiny", "--debug.seed=1", LOSSES]
SEQUENCES, LENGTH, TOP_K = 8, 128, 2
EP2 = ["--parallelism.data_parallel_shard_degree=2", "--parallelism.expert_parallel_degree=2"]
PP2 = ["--parallelism.pipeline_parallel_degree=2", "--parallelism.pipeline_parallel_schedule=1F1B"]
BATCH = [f"--training.global_batch_size={SEQUENCES}", f"--training.seq_len={LENGTH}"]


def moe(metrics: dict) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.startswith("moe/")}


def test_sinks_get_every_key_of_each_logged_step(ranks, tmp_path):
    """The run has ``log_freq`` 2 and per-layer metrics; numpy computes the expected values from the
    trace."""
    flags = [*TINY, *EP2, *BATCH, "--training.local_batch_size=4", "--training.steps=5"]
    flags += ["--metrics.enable_tensorboard", "--metrics.enable_wandb"]
    flags += ["--metrics.log_freq=2", "--metrics.moe_per_layer_logging"]
    by_rank = ranks.run(2, train_into_sinks, [*flags, f"--dump_folder={tmp_path}"])
    steps = [1, 2, 4]
    assert [step for step, _metrics in by_rank[0]] == steps
    assert [moe(metrics) for _, metrics in by_rank[0]] == [moe(m) for _, m in by_rank[1]]

    trace = read_trace(tmp_path)
    assert trace.steps.tolist() == steps
    # A step that is not logged adds nothing to the next that is.
    assert (trace.counts_SME.sum(axis=2) == SEQUENCES * LENGTH * TOP_K).all()
    violation_SM = trace.counts_SME.max(axis=2) / trace.counts_SME.mean(axis=2) - 1
    expected = {"max_violation": violation_SM.mean(axis=1)}
    for index, layer in enumerate(trace.layers):
        expected[f"max_violation_layer_{layer}"] = violation_SM[:, index]
    assert len(expected) == 1 + 3

    names = {name for name in by_rank[0][0][1] if name.startswith("moe/")}
    for layer in trace.layers:
        assert {f"moe/seq_load_balancing_loss_layer_{layer}", f"moe/z_loss_layer_{layer}"} <= names
    for written in (tensorboard(tmp_path), wandb(tmp_path)):
        assert {name for name in written if name.startswith("moe/")} == names
        for name, values in expected.items():
            by_step = written[f"moe/{name}"]
            assert list(by_step) == steps
            np.testing.assert_allclose(list(by_step.values()), values, rtol=1e-6)


@pytest.mark.parametrize(("num_ranks", "layout"), [(2, EP2), (2, PP2)], ids=["EP2", "PP2"])
def test_validation_leaves_training_and_its_numbers_alone(ranks, tmp_path, num_ranks, layout):
    flags = [*TINY, *layout, *BATCH, "--training.steps=3", "--debug.deterministic"]
    flags += ["--training.local_batch_size=4" if layout is EP2 else "--training.local_batch_size=8"]
    validate = ["--validator.enable", "--validator.freq=1", "--validator.steps=2"]
    validate += ["--validator.dataloader.dataset=python_docs"]
    plain = ranks.run(num_ranks, train_into_sinks, [*flags, f"--dump_folder={tmp_path}/plain"])
    mixed = ranks.run(
        num_ranks, train_into_sinks, [*flags, *validate, f"--dump_folder={tmp_path}/validated"]
    )
    for without, with_validation in zip(plain, mixed, strict=True):
        trained = [(step, metrics) for step, metrics in with_validation if moe(metrics)]
        validated = [metrics for _step, metrics in with_validation if not moe(metrics)]
        assert len(validated) == 3 and all(
            name.startswith("validation_metrics/") for metrics in validated for name in metrics
        )
        assert len(trained) == len(without) == 3
        for (step, metrics), (expected_step, expected) in zip(trained, without, strict=True):
            assert step == expected_step and moe(metrics) == moe(expected)
            for name in ("loss_metrics/global_avg_loss", "grad_norm"):
                assert metrics[name] == expected[name]
    counts, expected = (read_trace(tmp_path / name).counts_SME for name in ("validated", "plain"))
    assert (counts == expected).all()
    assert (counts.sum(axis=2) == SEQUENCES * LENGTH * TOP_K).all()

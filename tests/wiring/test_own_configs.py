"""Tests of a user's config functions: telemetry, adapters and checkpoints."""

from __future__ import annotations

import contextlib
import io
import logging

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.tensor import DTensor
from torchtitan.tools.logging import init_logger, logger

from tests.support import job_processes, own_configs
from tests.support.train_jobs import build, train_config
from titan_moe_lb.errors import JobError
from titan_moe_lb.job import job_config
from titan_moe_lb.traces.trace import read_trace

JOB = [
    "--module=tests.support.own_configs",
    "--training.local_batch_size=4",
    "--training.seq_len=128",
]


def run(
    name: str, folder: str, *flags: str, first_step: int = 1
) -> tuple[list[dict], dict[str, torch.Tensor], dict]:
    """Train as a rank does.

    Returns:
        The log; the weights and biases at the end; the parameters at the start.
    """
    arguments = ["--debug.no-enable-structured-logging", *JOB, f"--config={name}", *flags]
    config = job_config.load([*arguments, f"--dump_folder={folder}"]).config
    start, parts = {}, []

    def prepare(trainer) -> None:
        parts.extend(trainer.model_parts)
        start.update((n, p.detach().clone()) for n, p in parts[0].named_parameters())

    logged = train_config(config, first_step=first_step, prepare=prepare)
    end = {name: value.detach().clone() for name, value in parts[0].state_dict().items()}
    return logged, end, start


@pytest.mark.parametrize("name", ["torchtitans_metrics", "adapters_before", "adapters_after"])
def test_torchtitans_metrics_bring_the_load_of_the_experts(ranks, tmp_path, name):
    ((logged, _end, _start),) = ranks.run(1, run, name, str(tmp_path), "--training.steps=2")
    assert [step["moe/seq_load_balancing_loss"] >= 1 for step in logged] == [True, True]
    assert read_trace(tmp_path).steps.tolist() == [1, 2]


def test_a_config_without_a_model_is_refused():
    with pytest.raises(JobError, match="own_configs.without_a_model .* model_spec"):
        job_config.load([JOB[0], "--config=without_a_model"], 1)


def test_a_key_of_the_model_leaves_the_others_as_the_config_function_has_them():
    """The TOML of --print-config shows it too."""
    flags = [*JOB, "--config=torchtitans_metrics"]
    rule = '--model.expert_bias={type = "sign", speed = 0.01}'
    draft = job_config.draft([*flags, rule, "--metrics.moe_extreme_experts=2"])
    config = draft.resolve(1).config
    assert config.metrics.moe_extreme_experts == 2
    moe = config.model_spec.model.layers[1].moe
    assert [loss.describe() for loss in moe.router.aux_losses] == [
        loss.describe()
        for loss in job_config.load(flags).config.model_spec.model.layers[1].moe.router.aux_losses
    ]
    assert moe.router.expert_bias.speed == 0.01
    assert 'type = "sequence_wise"' in job_config.render(draft.table, config)


@pytest.mark.parametrize(
    ("start", "name"),
    [
        ("titan-moe-lb train", "metrics_of_ones_own"),
        ("torchtitan's trainer", "torchtitans_metrics"),
        ("torchtitan's trainer", "metrics_of_ones_own"),
    ],
)
def test_console_of_a_run(ranks, tmp_path, start, name):
    """A step has 8 rows: two passes of 4 on a rank.

    Own metrics log no loads, and one line names them.
    """
    if start == "torchtitan's trainer":
        (shown,) = ranks.run(1, printed_by_torchtitans_trainer, name, str(tmp_path))
    else:
        flags = [*JOB, f"--config={name}", "--training.global_batch_size=8", "--training.steps=2"]
        job = job_processes.fork(tmp_path, *flags, "--metrics.log_freq=1")
        status, out, err = job_processes.end(job, tmp_path)
        assert status == 0, err
        shown = "\n".join([*out, err])
    loads = [line for line in shown.splitlines() if "moe: " in line]
    named = [line for line in shown.splitlines() if "OwnMetrics" in line]
    own = name == "metrics_of_ones_own"
    assert (len(loads), len(named)) == ((0, 1) if own else (2, 0))
    assert (tmp_path / "moe_load.arrow").exists() == (not own)


def printed_by_torchtitans_trainer(name: str, folder: str) -> str:
    """Two steps of a config function, without the launcher. One rank."""
    config = getattr(own_configs, name)()
    config.training.local_batch_size, config.training.seq_len = 4, 128
    config.training.global_batch_size, config.training.steps = 8, 2
    config.metrics.log_freq, config.dump_folder = 1, folder
    config.debug.enable_structured_logging = False
    logging.disable(logging.NOTSET)  # which the pool has disabled
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        init_logger()
        trainer = build(config)
        trainer.train()
        trainer.close()
    return shown.getvalue()


@pytest.mark.parametrize("name", ["adapters_before", "adapters_after"])
def test_adapters_learn_alone_and_the_bias_moves(ranks, tmp_path, name):
    """The job runs on two ranks; its checkpoint continues it."""
    flags = ["--parallelism.data_parallel_shard_degree=2", "--checkpoint.enable"]
    flags += ["--checkpoint.no-last-save-model-only"]
    folder = str(tmp_path)
    for _logged, end, start in ranks.run(2, changed, name, folder, "--training.steps=2", *flags):
        learned = {n for n, moved in start.items() if moved}
        assert learned and all(".lora_a." in n or ".lora_b." in n for n in learned)
        assert all(value > 0 for value in end.values())
    flags.append("--training.steps=3")
    ((logged, _end, _start), _other) = ranks.run(2, changed, name, folder, *flags, first_step=3)
    assert [step["moe/seq_load_balancing_loss"] >= 1 for step in logged] == [True]


def changed(name: str, folder: str, *flags: str, first_step: int = 1) -> tuple:
    """Log of a run, range of each layer's bias, and whether each parameter changed."""
    logged, end, start = run(name, folder, *flags, first_step=first_step)
    biases = {n: (b.max() - b.min()).item() for n, b in end.items() if n.endswith("expert_bias_E")}
    moved = {n: not torch.equal(_local(end[n]), _local(value)) for n, value in start.items()}
    return logged, biases, moved


def _local(value: torch.Tensor) -> torch.Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def test_losses_without_effect_are_named(ranks, tmp_path):
    (warnings,) = ranks.run(1, warnings_of, "adapters_late", str(tmp_path))
    assert [line for line in warnings if "aux_losses" in line and "layer 1:" in line]
    (warnings,) = ranks.run(1, warnings_of, "adapters_before", str(tmp_path))
    assert not any("aux_losses" in line for line in warnings)


def warnings_of(name: str, folder: str) -> list[str]:
    lines: list[str] = []
    original = logger.warning
    logger.warning = lines.append
    try:
        run(name, folder, "--training.steps=1")
    finally:
        logger.warning = original
    return lines


@pytest.mark.parametrize("in_hf", [False, True], ids=["distributed", "Hugging Face"])
def test_export_in_bfloat16_keeps_the_bits_of_the_balance(ranks, tmp_path, in_hf):
    flags = ["--parallelism.data_parallel_shard_degree=2", "--training.steps=3"]
    flags += ["--checkpoint.enable", "--checkpoint.export_dtype=bfloat16"]
    flags += ["--checkpoint.last-save-model-only"]
    flags += ["--checkpoint.last_save_in_hf"] if in_hf else []
    biases = ranks.run(2, exported, "torchtitans_metrics", str(tmp_path), *flags)[0]
    folder = tmp_path / "checkpoint" / "step-3"
    if in_hf:
        saved = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
        names = [n for n in saved if n.endswith("e_score_correction_bias")]
    else:
        dcp_to_torch_save(folder, tmp_path / "whole.pt")
        saved = torch.load(tmp_path / "whole.pt")
        names = [n for n in saved if n.endswith("expert_bias_E")]
    found = [saved[name] for name in sorted(names)]
    assert len(found) == len(biases) > 0
    for bias, right in zip(found, biases, strict=True):
        assert bias.dtype == torch.float32 and torch.equal(bias, right)
        assert not torch.equal(bias, bias.bfloat16().float()), "bits that bfloat16 has not"
    weights = [v for n, v in saved.items() if n.endswith("weight")]
    assert weights and all(weight.dtype == torch.bfloat16 for weight in weights)


def exported(name: str, folder: str, *flags: str) -> list[torch.Tensor]:
    _logged, end, _start = run(name, folder, *flags)
    return [_local(end[n]) for n in sorted(end) if n.endswith("expert_bias_E")]

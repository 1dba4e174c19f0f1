"""Config functions of one's own: telemetry, adapters, and what their checkpoints hold."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests import own_configs
from tests.train_jobs import train_config
from titan_moe_lb.job import job_config
from titan_moe_lb.router import moe_layers_of
from titan_moe_lb.traces.trace import read_trace

JOB = ["--module=tests.own_configs", "--training.local_batch_size=4", "--training.seq_len=128"]


def run(name: str, folder: str, *flags: str) -> tuple[list[dict], dict[str, torch.Tensor], dict]:
    """Train as a rank does: what is logged, the weights and biases at the end, and those that
    learn with their values at the start."""
    arguments = ["--debug.no-enable-structured-logging", *JOB, f"--config={name}", *flags]
    config = job_config.load([*arguments, f"--dump_folder={folder}"]).config
    start, parts = {}, []

    def prepare(trainer) -> None:
        parts.extend(trainer.model_parts)
        start.update((n, p.detach().clone()) for n, p in parts[0].named_parameters())

    logged = train_config(config, prepare=prepare)
    end = {name: value.detach().clone() for name, value in parts[0].state_dict().items()}
    return logged, end, start


@pytest.mark.parametrize("name", ["torchtitans_metrics", "adapters_before", "adapters_after"])
def test_torchtitans_metrics_bring_the_load_of_the_experts(ranks, tmp_path, name):
    ((logged, _end, _start),) = ranks.run(1, run, name, str(tmp_path), "--training.steps=2")
    assert [step["moe/seq_load_balancing_loss"] >= 1 for step in logged] == [True, True]
    assert read_trace(tmp_path).steps.tolist() == [1, 2]


def test_flags_of_the_metrics_of_experts_are_there():
    config = job_config.load([*JOB, "--config=torchtitans_metrics", "--metrics.moe_extreme_experts=2"])
    assert config.config.metrics.moe_extreme_experts == 2


@pytest.mark.parametrize("start", ["titan-moe-lb train", "torchtitan.train"])
@pytest.mark.parametrize("name", ["torchtitans_metrics", "metrics_of_ones_own"])
def test_what_the_console_shows(tmp_path, start, name):
    """8 rows a step: 4 on a rank, twice."""
    flags = [*JOB, f"--config={name}", "--training.global_batch_size=8", "--training.steps=2"]
    command = ["-m", "titan_moe_lb.cli", "train"]
    if start == "torchtitan.train":
        command = ["-c", TORCHTITANS]
    run = subprocess.run(
        [sys.executable, *command, *flags, "--metrics.log_freq=1", f"--dump_folder={tmp_path}"],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ
        | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
        | {"MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
        if start == "torchtitan.train"
        else os.environ,
    )
    said = run.stdout + run.stderr
    assert run.returncode == 0, said
    lines = [line for line in said.splitlines() if "moe: " in line]
    traced = (tmp_path / "moe_load.arrow").exists()
    if name == "torchtitans_metrics":
        assert len(lines) == 2 and traced
    else:
        assert not lines and not traced
        assert len([line for line in said.splitlines() if "OwnMetrics" in line]) == 1
    if start == "titan-moe-lb train":
        assert "8 x 128 tokens a step" in said


TORCHTITANS = """
import sys
from titan_moe_lb.upstream import cpu
cpu.prepare()
from torchtitan.trainer import Trainer
import tests.own_configs
from torchtitan.config import ConfigManager
values = dict(a.removeprefix("--").partition("=")[::2] for a in sys.argv[1:])
config = getattr(tests.own_configs, values["config"])()
config.training.local_batch_size, config.training.seq_len = 4, 128
config.training.global_batch_size, config.training.steps = 8, 2
config.metrics.log_freq, config.dump_folder = 1, values["dump_folder"]
config.debug.enable_structured_logging = False
from torchtitan.tools.logging import init_logger
init_logger()
cpu.adapt(config)
trainer = config.build()
trainer.train()
trainer.close()
"""

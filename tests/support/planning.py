"""Jobs of the tests of ``titan-moe-lb plan``, on the ranks of a pool."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
from pathlib import Path
from typing import Any

import numpy as np

from titan_moe_lb import cli
from titan_moe_lb.commands.plan import tables
from titan_moe_lb.commands.plan.building import silent_build
from titan_moe_lb.commands.plan.serving.command import ALONE
from titan_moe_lb.costmodel.hardware.device import SPECS
from titan_moe_lb.job import job_config
from titan_moe_lb.traces.columns import Column
from titan_moe_lb.traces.run_info import RunInfo
from titan_moe_lb.traces.step_load import StepLoad
from titan_moe_lb.traces.trace import TraceWriter
from titan_moe_lb.upstream import cpu

TINY = ["--module", "deepseek_v3", "--config", "deepseek_v3_tiny"]

# Round figures, so that the hand can follow: arithmetic is always the limit.
DEVICE = {
    "bf16_flops": 1e12,
    "memory_bytes": 1e8,
    "memory_bandwidth": 1e15,
    "scale_up_domain": 8,
    "scale_up_bandwidth": 1e9,
    "scale_up_latency": 1e-9,
    "scale_out_bandwidth": 1e9,
    "scale_out_latency": 1e-9,
}


def device_file(folder: Path) -> str:
    assert set(DEVICE) == set(SPECS)
    path = folder / "device.toml"
    path.write_text("\n".join(f"{name} = {value!r}" for name, value in DEVICE.items()))
    return str(path)


def plan(ranks, arguments: list[str], job: list[str]) -> dict:
    """Plan the tiny model on a rank of the pool."""
    status, out, err = ranks.run(1, command, ["plan", "--json", *arguments, "--", *TINY, *job])[0]
    assert status == 0, err
    return json.loads(out)


def write_run(
    folder: Path, counts_SME: np.ndarray, micro_batches_SME: np.ndarray | None = None, **changes
) -> None:
    """Write a trace of the tiny model with these loads."""
    facts = {
        "model": "deepseek_v3",
        "flavor": "tiny",
        "num_experts": 8,
        "expert_groups": (),
        "top_k": 2,
        "layers": (1, 2, 3),
        **dict.fromkeys(("world_size", "pp", "dp_replicate", "dp_shard", "cp", "tp", "ep"), 1),
        "schedule": None,
        "local_batch_size": 4,
        "global_batch_size": 4,
        "micro_batch_size": 4,
        "seq_len": 128,
        "started": "2026-01-01T00:00:00+00:00",
        "version": "0",
        "columns": (Column("max_overload_factor", summary="max"),),
        **changes,
    }
    writer = TraceWriter(folder, RunInfo(**facts))
    layers = facts["layers"]
    ones = np.ones(len(layers))
    for index, counts_ME in enumerate(counts_SME):
        load = StepLoad(
            layers=layers,
            counts_ME=counts_ME,
            micro_batch_counts_ME=None if micro_batches_SME is None else micro_batches_SME[index],
            layer_columns={"max_overload_factor": ones},
        )
        writer.write(index + 1, load)
    writer.close()


def command(arguments: list[str]) -> tuple[int, str, str]:
    """Run the program; return exit status, standard output and standard error."""
    os.environ.pop("NGPU", None)
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(arguments)
        except SystemExit as stop:
            status = int(stop.code or 0)
    return status, out.getvalue(), err.getvalue()


def command_with_table(file: str, arguments: list[str]) -> tuple[int, str, str]:
    """Run :func:`command` with one more table, whose function is in a file."""
    before = tables.TABLES
    tables.TABLES = (*before, runpy.run_path(file)["table"])
    try:
        return command(arguments)
    finally:
        tables.TABLES = before


def built_state(arguments: list[str]) -> dict[str, Any]:
    """Train one optimizer step; return the state of a job on this rank of a real process group."""
    import torch

    from tests.support.train_jobs import skip_initialisation
    from titan_moe_lb.parallel.local_shard import local_shard

    job = job_config.load([*arguments, "--debug.no-enable-structured-logging"])
    if cpu.needed():
        cpu.adapt(job.config)
    skip_initialisation(job.config)
    trainer = job.config.build()
    local = []
    for part in trainer.model_parts:
        for parameter in part.parameters():
            parameter.grad = torch.zeros_like(parameter)
            local.append(local_shard(parameter))
    trainer.optimizers.step()
    states = [
        local_shard(value)
        for optimizer in trainer.optimizers
        for state in optimizer.state.values()
        for value in state.values()
        # Adam counts its steps in a scalar beside each parameter.
        if value.dim() > 0
    ]
    trainer.close()
    return {
        "num_parameters": sum(shard.numel() for shard in local),
        "parameter_bytes": sum(shard.numel() * shard.element_size() for shard in local),
        "optimizer_bytes": sum(shard.numel() * shard.element_size() for shard in states),
        "layers": [
            int(name)
            for part in trainer.model_parts
            for name, _block in part.get_submodule("layers").named_children()
        ],
    }


def unit_makespan(arguments: list[str], world_size: int) -> tuple[float, int]:
    """Compute the makespan of a job's pipeline schedule if a forward takes 1 and a backward 2."""
    from titan_moe_lb.costmodel.jobs.read_job import read_job
    from titan_moe_lb.costmodel.times.step import makespan

    job = read_job(job_config.load(arguments, world_size))
    stages = len(job.stages)
    return makespan(job.schedule, [1.0] * stages, [2.0] * stages), stages


def block_without_norm() -> str:
    """Return the error for a model part whose second block is of an unknown kind."""
    from torch import nn

    from titan_moe_lb.costmodel.jobs.read_job import _blocks
    from titan_moe_lb.errors import JobError

    known, unknown = nn.Linear(1, 1), nn.Linear(1, 1)
    known.attention_norm = nn.RMSNorm(1)
    part = nn.Module()
    part.layers = nn.ModuleDict({"0": known, "7": unknown})
    try:
        _blocks(part)
    except JobError as error:
        return str(error)
    return ""


def served_sizes(
    config: str, context: int = 1, flags: list[str] | None = None
) -> tuple[float, float]:
    """Return the bytes of a served model's caches for one token, and of its weights."""
    from titan_moe_lb.costmodel.jobs.read_served import read_served

    module = next(name for name in ("deepseek_v3", "qwen3", "gpt_oss") if config.startswith(name))
    job = ["--module", module, "--config", config, *ALONE, *(flags or [])]
    with silent_build():
        model = read_served(job_config.load(job, 1))
    return model.cache_bytes(context) / context, model.weight_bytes(ep_degree=1)

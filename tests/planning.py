"""What the tests of ``titan-moe-lb plan`` run on the ranks of a pool."""

from __future__ import annotations

import contextlib
import io
import os
from typing import Any

from titan_moe_lb import cli
from titan_moe_lb.job import job_config
from titan_moe_lb.upstream import cpu


def command(arguments: list[str]) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the program."""
    os.environ.pop("NGPU", None)
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(arguments)
        except SystemExit as stop:
            status = int(stop.code or 0)
    return status, out.getvalue(), err.getvalue()


def built_state(arguments: list[str]) -> dict[str, Any]:
    """What this rank of a real process group holds of a job, after one optimizer step."""
    import torch

    from tests.train_jobs import skip_initialisation
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
    """Of a job's own pipeline schedule when every forward takes 1 and every backward 2."""
    from titan_moe_lb.costmodel.makespan import makespan
    from titan_moe_lb.costmodel.read_job import read_job

    os.environ["WORLD_SIZE"] = str(world_size)
    job = read_job(job_config.load(arguments).config)
    stages = len(job.stages)
    return makespan(job.schedule, [1.0] * stages, [2.0] * stages), stages

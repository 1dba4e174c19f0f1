"""Flags of ``titan-moe-lb plan``. This module imports little, so ``--help`` is instant."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from titan_moe_lb.costmodel.times.moe_layer import Dispatcher
from titan_moe_lb.terminal.optional_flag import Switch, optional_flag


@dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """The job to plan, its hardware and its loads."""

    hardware: Annotated[str, tyro.conf.arg(metavar="DEVICE")]
    """h100, h800, h200, b200, gb200_nvl72, mi300x, tpu_v5p, or a TOML file."""
    job_config: Annotated[str | None, optional_flag("JOB")] = None
    """Job file or its name, as for train; default: the debug job of deepseek_v3."""
    job_flags: Annotated[tyro.conf.Positional[tuple[str, ...]], optional_flag("[-- FLAG ...]")] = ()
    """Flags of the job, after --, as for train: -- --training.local_batch_size 4"""
    ranks: Annotated[int | None, optional_flag("N")] = None
    """Ranks of the job; data_parallel_shard_degree follows.
    Default: NGPU, else ranks in the job file, else 1."""
    ep: Annotated[str | None, optional_flag("N[,N]")] = None
    """Expert-parallel degrees to compare; default: that of the job and the nearest others."""
    imbalance: Annotated[str | None, optional_flag("LOAD[,LOAD]")] = None
    """Assumed loads, each a number, worst, lognormal:SIGMA, or overload:FACTOR@EP.
    A number is the load of the most loaded expert over the mean; worst is its largest value.
    lognormal draws loads with that standard deviation of their logarithm.
    overload draws log-normal loads with that overload factor at that EP degree.
    Default: 1.0,1.5,2.0,worst; with --serve 1.0."""
    hot_experts: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """Number of experts with that load, at most top_k; the others share the rest."""
    from_run: Annotated[Path | None, optional_flag("RUN_DIR")] = None
    """Run of the same experts and top_k; plan with its measured loads too."""
    measured_step: Annotated[float | None, optional_flag("SECONDS")] = None
    """Measured time of a step on this hardware, to split into balance, imbalance and the rest;
    default: that of the run, if its layout is the job's."""
    redundant_experts: Annotated[str | None, optional_flag("N[,N]")] = None
    """Slots for copies of hot experts, to predict the saving of EPLB. Needs --from-run."""
    drop_share: Annotated[float | None, optional_flag("SHARE")] = None
    """Share of the tokens that a capacity factor may drop, and of the micro-batches that may
    overrun one; default: 0.01. Needs --from-run."""
    dispatcher: Dispatcher = "standard"
    """standard sends every copy of a token; deepep (and HybridEP) one to each node and rank.
    low_latency is standard with all messages started at once, for --serve only."""
    compute_efficiency: Annotated[float, tyro.conf.arg(metavar="SHARE")] = 0.5
    """Share of the peak FLOP/s that matrix products reach."""
    network_efficiency: Annotated[float, tyro.conf.arg(metavar="SHARE")] = 0.8
    """Share of the link bandwidth that an all-to-all reaches."""
    serve: Switch = False
    """Plan a deployment of the model instead: decode and prefill steps of one EP group."""
    tokens: Annotated[str | None, optional_flag("N[,N]")] = None
    """Tokens of a device in a step; default: 1,8,64,512,4096. Needs --serve."""
    context: Annotated[int | None, optional_flag("N")] = None
    """Tokens of a sequence, prompt included; default: 4096. Needs --serve."""
    json: Switch = False
    """Print JSON instead of sentences and tables."""
    output: Annotated[Path | None, optional_flag("FILE", "-o")] = None
    """Write an HTML page with charts, too."""

    @property
    def assumptions(self) -> dict[str, Any]:
        """Assumptions of an answer, as plain data."""
        names = ("hot_experts", "compute_efficiency", "network_efficiency", "dispatcher")
        return {name: getattr(self, name) for name in names}

    @property
    def job_arguments(self) -> list[str]:
        """Flags that define the job, as for ``run_train.sh``."""
        file = ["--job-config", self.job_config] if self.job_config else []
        return [*file, *self.job_flags]

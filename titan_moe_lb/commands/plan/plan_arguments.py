"""Flags of ``titan-moe-lb plan``. This module imports little, so ``--help`` is instant."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from titan_moe_lb.costmodel.times.dispatch import Dispatcher


@dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """The job to plan, its hardware and its loads."""

    hardware: str
    """Device: h100, h800, h200, b200, gb200_nvl72, mi300x, tpu_v5p, or a TOML file."""
    job_config: str | None = None
    """The job's TOML file or its name, as for train; without it, the default debug job."""
    job_flags: tyro.conf.Positional[tuple[str, ...]] = ()
    """Other flags of the job, after --, as in: -- --training.local_batch_size 4"""
    ranks: int | None = None
    """Ranks of the job; default: NGPU, else the [job] ranks of its file, else 1."""
    imbalance: str | None = None
    """Loads, separated by commas. A number in [1, E/K] is the load of the most loaded expert over
    the mean; worst is E/K. lognormal:SIGMA draws loads whose logarithms have standard deviation
    SIGMA. overload:FACTOR@EP draws log-normal loads that have this overload factor at this EP
    degree. Default 1.0,1.5,2.0,worst; with --serve 1.0."""
    hot_experts: int = 1
    """Number of experts with that load, at most top_k; the others share the rest evenly."""
    ep: str | None = None
    """Expert-parallel degrees, as in 8,16,32; default: the job's own and those near it."""
    from_run: Path | None = None
    """Folder of a run of the same model; its measured load is planned with, too."""
    redundant_experts: str | None = None
    """Slots for copies of hot experts, as in 16,32, to predict the savings of EPLB. Needs
    --from-run."""
    drop_share: float | None = None
    """Share of tokens that a capacity may drop, and of micro-batches that may overrun one; default
    0.01. Needs --from-run."""
    dispatcher: Dispatcher = "standard"
    """standard sends every copy of a token. deepep sends one copy to each node and rank.
    low_latency is standard with all messages started at once, for --serve only."""
    compute_efficiency: float = 0.5
    """Share of the peak FLOP/s that matrix products reach."""
    network_efficiency: float = 0.8
    """Share of the link bandwidth that an all-to-all reaches."""
    serve: bool = False
    """Plan a deployment of the job's model instead: decode and prefill steps of one
    expert-parallel group."""
    tokens: str | None = None
    """Tokens of a rank in a step, one for each sequence in decode; default 1,8,64,512,4096. Needs
    --serve."""
    context: int | None = None
    """Tokens of a sequence, prompt included; default 4096. Needs --serve."""
    json: bool = False
    """Print JSON instead of a table."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Write an HTML page with charts to this file, too."""

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

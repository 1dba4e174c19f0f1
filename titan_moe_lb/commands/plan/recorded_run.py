"""Loads of a recorded run, checked against the model of a job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from titan_moe_lb.costmodel.loads.lognormal import fitted_sigma
from titan_moe_lb.costmodel.loads.recorded import RecordedLoads
from titan_moe_lb.costmodel.times.moe_layer import MoELayer
from titan_moe_lb.errors import JobError
from titan_moe_lb.traces.expert_order import coarse_to_fine
from titan_moe_lb.traces.trace import Trace


def loads_of_run(
    trace: Trace, moe_layers: Mapping[int, MoELayer]
) -> tuple[dict[str, Any], RecordedLoads]:
    """Read the facts and loads of a run.

    A run may have another number of MoE layers than the job. Its layers, in order, then stand for
    equal parts of the job's depth.

    Returns:
        Facts of the run as plain data, and its loads.

    Raises:
        JobError: run and job differ in experts or top_k, or the run's layers differ among
            themselves. The names of the models may differ.
    """
    info = trace.info
    if info.num_experts_by_layer or info.top_k_by_layer:
        raise JobError(
            f"--from-run {trace.path.parent} is of {info.model_name}: a plan takes the loads of a "
            "run whose layers have one number of experts and one top_k"
        )
    layer = next(iter(moe_layers.values()))
    shapes = {(one.num_experts, one.top_k) for one in moe_layers.values()}
    if shapes != {(info.num_experts, info.top_k)}:
        raise JobError(
            f"--from-run {trace.path.parent} is of {info.model_name}, the job's layers have "
            f"{layer.num_experts} experts, top {layer.top_k}: take a run of the job's model, or the "
            "run's model as the job"
        )
    rows = np.arange(len(moe_layers)) * len(info.layers) // len(moe_layers)
    overload_S = trace.over_steps("max_overload_factor")
    known = bool(np.isfinite(overload_S).any())
    recorded = RecordedLoads(
        counts_SME=trace.counts_SME[:, rows],
        micro_batch_counts_SME=trace.micro_batch_counts_SME[:, rows],
        expert_groups=(
            coarse_to_fine([layer.num_groups]) if info.expert_groups is None else info.expert_groups
        ),
        ep_degree=info.ep,
        max_overload_factor=float(np.nanmax(overload_S[len(overload_S) // 2 :])) if known else 0.0,
    )
    window = recorded.window
    seconds_S = trace.over_steps("step_seconds")[-window:]
    known_seconds = seconds_S[np.isfinite(seconds_S)]
    run = {
        "path": str(trace.path.parent),
        "num_layers": len(info.layers),
        "num_planned_layers": len(moe_layers),
        "layout": info.layout,
        "is_foreign": info.is_foreign,
        "losses": info.losses,
        "forced_routing": info.forced_routing,
        "expert_bias": info.expert_bias,
        "first_steps": trace.steps[:window].tolist(),
        "last_steps": trace.steps[-window:].tolist(),
        "ep_degree": info.ep,
        "ranks": info.world_size,
        "tokens_per_step": info.global_batch_size * info.seq_len,
        # From single micro-batches; the counts are of whole global batches.
        "max_overload_factor": float(np.nanmax(overload_S)) if known else None,
        "micro_batches": len(recorded.micro_batch_counts_SME),
        "is_sample": trace.is_sample,
        "step_seconds": float(np.median(known_seconds)) if len(known_seconds) else None,
        # From whole global batches: in small micro-batches, sampling noise would add to sigma.
        "sigma": fitted_sigma(recorded.known(slice(-window, None))),
    }
    return run, recorded

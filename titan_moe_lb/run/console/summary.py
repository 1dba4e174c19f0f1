"""Summary of a job, for its user: before the first step and after the last."""

from __future__ import annotations

import os
from typing import Any

from torchtitan.tools.utils import device_module

from titan_moe_lb.balancing.freezing import applied_losses
from titan_moe_lb.balancing.router import router_configs
from titan_moe_lb.checkpoints.resume_point import left_out, own_folder
from titan_moe_lb.resolved_job import Job
from titan_moe_lb.run.console import rank_log
from titan_moe_lb.run.console.saved import Saved
from titan_moe_lb.traces.run_info import RunInfo


def before(job: Job, rank: int) -> str:
    """Describe model, layout, balancing, data, output and start, one line each."""
    lines = {"data": _data(job), "output": _output(job.config, rank), "start": _start(job)}
    return "\n".join([model(job), _aligned(lines)])


def model(job: Job) -> str:
    """Describe model, layout and balancing, one line each."""
    info: RunInfo | None = getattr(job.bound.metrics, "run_info", None)
    spec = job.config.model_spec
    numbers = sum(parameter.numel() for parameter in job.meta_model.parameters())
    lines = {
        "model": f"{info.model_name if info else f'{spec.name} {spec.flavor}'}, "
        f"{numbers:,} parameters",
        "layout": f"{_layout(job, info)}; on {device_module.get_device_name(0)}",
    }
    if info is not None:
        lines["balancing"] = _balancing(job, info)
    return _aligned(lines)


def after(config: Any, saved: Saved) -> str:
    """Name the results and the command that shows them, in one line."""
    step, parts = saved.checkpoint, []
    if step is not None:
        parts.append(f"checkpoint {own_folder(config) / f'step-{step}'}")
    if saved.has_trace:
        parts.append(f"trace {saved.trace}: titan-moe-lb report {config.dump_folder}")
    return f"done      {'; '.join(parts) or config.dump_folder}"


def _aligned(lines: dict[str, str]) -> str:
    return "\n".join(f"{name:9}  {line}" for name, line in lines.items())


def _layout(job: Job, info: RunInfo | None) -> str:
    if info is not None:
        words = info.layout
    else:
        size = job.layout.world_size
        words = f"{size} rank{'s' if size > 1 else ''}"
    compiled = ["compiled"] if job.config.compile.enable else []
    policy = job.config.activation_checkpoint
    recomputed = [f"{type(policy)._owner.__name__} checkpointing"] if policy is not None else []
    return ", ".join([words, *compiled, *recomputed])


def _balancing(job: Job, info: RunInfo) -> str:
    applied = applied_losses([*router_configs(job.config.model_spec).values()])
    losses = [
        ", ".join(
            [f"{loss._owner.metric_name.replace('_', ' ')} x {loss.weight:g}"]
            + [str(change) for change in loss.changes]
        )
        for loss in applied
    ]
    bias = f"expert bias {info.expert_bias}" if info.expert_bias else "no expert bias"
    frozen = [
        f"{part} of layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))} frozen"
        for part, layers in info.frozen.items()
    ]
    forced = [f"FORCED ROUTING {info.forced_routing}"] if info.forced_routing else []
    forced += [f"routing {info.routing}"] if info.routing else []
    return "; ".join([*(losses or ["no aux loss"]), bias, *frozen, *forced])


def _data(job: Job) -> str:
    config, batch = job.config, job.cut
    source = getattr(config.dataloader, "dataset", type(config.dataloader).__qualname__)
    path = getattr(config.dataloader, "dataset_path", None)
    return (
        f"{source}{f' ({path})' if path else ''}, {batch.global_batch_size} x {batch.seq_len} tokens "
        f"a step, {config.training.steps} steps"
    )


def _output(config: Any, rank: int) -> str:
    log = rank_log.folder_of(config.dump_folder) / f"rank{rank}.log"
    if not config.checkpoint.enable:
        saves = "no checkpoints"
    else:
        saves = f"a checkpoint every {config.checkpoint.interval} steps"
    return f"{config.dump_folder}, {saves}; full log: {log}"


def _start(job: Job) -> str:
    cut_short = left_out(job.config, job.start)
    words = _start_in_words(job)
    if cut_short:
        steps = " and ".join(map(str, cut_short))
        words += f"; the incomplete save of step {steps} is ignored and will be repeated"
    return words


def _start_in_words(job: Job) -> str:
    config, start = job.config, job.start
    if start is not None and start.step is not None:
        return f"resumes after step {start.step} of {start.path.parent}"
    if start is not None:
        return f"with the weights of {start.path}"
    if config.checkpoint.enable and config.checkpoint.initial_load_in_hf:
        path = config.checkpoint.initial_load_path or config.hf_assets_path
        return f"with the Hugging Face weights of {path}"
    return "fresh"


def ranks_shown(job: Job) -> list[int]:
    """Return the ranks of LOG_RANK; default: the rank that knows the loss."""
    chosen = os.environ.get("LOG_RANK")
    return [int(rank) for rank in chosen.split(",")] if chosen else [_metrics_rank(job)]


def knows_loss(job: Job, rank: int) -> bool:
    """Return True if the rank has a part of the last pipeline stage."""
    return rank // job.layout.stage_ranks == _metrics_rank(job) // job.layout.stage_ranks


def _metrics_rank(job: Job) -> int:
    return job.layout.metrics_rank(job.config.parallelism.pipeline_parallel_schedule)

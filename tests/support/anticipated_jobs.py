"""Anticipatory training, and its reference: a loop that copies old parameters. On every rank."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torchtitan.trainer import Trainer

from tests.support.train_jobs import _Capture, build
from titan_moe_lb.balancing.recording.recomputation import is_recomputation
from titan_moe_lb.balancing.router import moe_layers_of, routers_of
from titan_moe_lb.job import job_config
from titan_moe_lb.parallel.local_shard import local_shard
from titan_moe_lb.parallel.rank_groups import RankGroups

LOSS = "loss_metrics/global_avg_loss"
SPEED = 0.01


def _trainer(arguments: list[str], first_step: int = 1) -> tuple[Trainer, list[dict[str, float]]]:
    job = job_config.load(["--debug.no-enable-structured-logging", *arguments])
    job.config.metrics.write_moe_trace = False
    job.config.training.mixed_precision_param = "float32"
    trainer = build(job.config)
    for part in trainer.model_parts:
        for name, parameter in part.named_parameters():
            if "router.gate.weight" in name:  # A gate whose choices change with the step.
                local_shard(parameter.data).mul_(20)
    logged: list[dict[str, float]] = []
    trainer.metrics_processor.logger = _Capture(logged, first_step)
    return trainer, logged


def trained(arguments: list[str]) -> tuple[list[float], list[torch.Tensor], list[torch.Tensor]]:
    """Train a job; return losses, experts of every router's training forwards, and biases."""
    trainer, logged = _trainer(arguments)
    experts: list[torch.Tensor] = []
    for router in routers_of(trainer.model_parts):
        _watch(router, experts)
    trainer.train()
    biases = [layer.expert_bias_E for layer in moe_layers_of(trainer.model_parts)]
    biases = [local_shard(b).cpu().clone() for b in biases if b is not None]
    trainer.close()
    return [line[LOSS] for line in logged], experts, biases


def reference(
    arguments: list[str], delay: int
) -> tuple[list[float], list[torch.Tensor], list[torch.Tensor]]:
    """Train without ``routing``, as :func:`trained` with it; the loop keeps old parameters.

    The experts of a batch come from a forward under the copied parameters and biases of ``delay``
    steps ago. A hook on the routers gathers their scores. The bias moves by the sign rule here, on
    the counts of what was dispatched.
    """
    trainer, logged = _trainer(arguments)
    routers = routers_of(trainer.model_parts)
    layers = moe_layers_of(trainer.model_parts)
    groups = RankGroups.of(trainer.parallel_dims)
    experts: list[torch.Tensor] = []
    forced: dict[Any, torch.Tensor] = {}
    seen: dict[Any, torch.Tensor] = {}
    counts = {router: torch.zeros(router.num_experts, dtype=torch.int64) for router in routers}

    def hook(router: Any, _args: Any, output: Any) -> Any:
        _scores, ids_BLK, all_BLE = output
        if router not in forced:
            seen[router] = local_shard(ids_BLK).clone()
            return output
        ids_BLK = forced[router]
        scores_BLK = all_BLE.gather(-1, ids_BLK)
        if router.route_norm:
            scores_BLK = scores_BLK / (scores_BLK.sum(dim=-1, keepdim=True) + 1e-20)
        return scores_BLK * router.route_scale, ids_BLK, all_BLE

    for router in routers:
        router.register_forward_hook(hook)
    steps, per_step = trainer.config.training.steps, trainer.gradient_accumulation_steps
    batches = trainer.batch_generator(trainer.dataloader)
    old: deque[dict[str, torch.Tensor]] = deque(maxlen=delay + 1)
    step_of = trainer.forward_backward_step

    def forward_backward(*, input_dict: Any, labels: Any, **others: Any) -> Any:
        now = _state(trainer)
        _set_state(trainer, old[0])
        forced.clear()
        tokens = trainer.ntokens_seen
        inputs, _labels, extra = trainer.post_dataloading_process(dict(input_dict), labels)
        trainer.ntokens_seen = tokens
        with torch.no_grad(), trainer.train_context():
            trainer.model_parts[0](inputs, **extra)
        _set_state(trainer, now)
        for router in routers:
            forced[router] = seen[router]
            experts.append(seen[router].cpu())
            counts[router] += torch.bincount(
                seen[router].flatten().cpu(), minlength=router.num_experts
            )
        return step_of(input_dict=input_dict, labels=labels, **others)

    trainer.forward_backward_step = forward_backward
    for trainer.step in range(1, steps + 1):
        old.append(_state(trainer))
        trainer.train_step(iter([next(batches) for _ in range(per_step)]))
        for layer in layers:
            counts_E = counts[layer.router]
            for group in groups.tokens:
                dist.all_reduce(counts_E, group=group)
            delta_E = SPEED * torch.sign(counts_E.sum() - len(counts_E) * counts_E)
            local_shard(layer.expert_bias_E).add_(delta_E - delta_E.mean())
            counts[layer.router] = torch.zeros_like(counts_E)
    biases = [local_shard(layer.expert_bias_E).cpu().clone() for layer in layers]
    trainer.close()
    return [line[LOSS] for line in logged], experts, biases


def _watch(router: Any, experts: list[torch.Tensor]) -> None:
    def hook(_router: Any, _args: Any, output: Any) -> None:
        if torch.is_grad_enabled() and router.training and not is_recomputation():
            experts.append(local_shard(output[1]).cpu().clone())

    router.register_forward_hook(hook)


def _state(trainer: Trainer) -> dict[str, torch.Tensor]:
    (part,) = trainer.model_parts
    named = [*part.named_parameters(), *part.named_buffers()]
    return {name: local_shard(tensor.data).clone() for name, tensor in named}


def _set_state(trainer: Trainer, state: dict[str, torch.Tensor]) -> None:
    (part,) = trainer.model_parts
    _reshard(part)
    for name, tensor in [*part.named_parameters(), *part.named_buffers()]:
        local_shard(tensor.data).copy_(state[name])


def _reshard(part: Any) -> None:
    for module in part.modules():
        if isinstance(module, FSDPModule):
            module.reshard()

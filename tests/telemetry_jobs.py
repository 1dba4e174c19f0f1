"""What the telemetry tests run on the ranks of a pool."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.pipelining.schedules import Schedule1F1B, _ComputationType
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.config import ParallelismConfig
from torchtitan.config.override import derive
from torchtitan.distributed import ParallelDims
from torchtitan.models.common.config_utils import make_router_config

from titan_moe_lb.job import job_config
from titan_moe_lb.losses import SequenceWiseAuxLoss
from titan_moe_lb.recording import event_clock, recorder
from titan_moe_lb.router import LoadBalancedRouter, routers_of
from titan_moe_lb.telemetry.reduction import reduce_over_tokens, reduce_step
from titan_moe_lb.upstream import cpu, zero_bubble


def simulated_peaks(arguments: list[str]) -> dict[str, float]:
    """One step; this rank's peak of held tokens by the schedule's own list of actions.

    The independent side of the cumulative overload: torch's pipeline order instead of
    the clock, and sums over the EP group made here.
    """
    config = job_config.load(arguments).config
    config.training.steps = 1
    config.metrics.write_moe_trace = False
    cpu.adapt(config)
    zero_bubble.adapt(config)
    trainer = config.build()
    logged: dict[str, Any] = {}
    trainer.metrics_processor.logger.log = lambda metrics, step: logged.update(metrics)
    trainer.train()
    routers = routers_of(trainer.model_parts)
    mesh = trainer.parallel_dims.get_mesh("ep")
    actual, balanced = {}, {}
    for router in routers:
        counts_ME = router.recorder.step_counts_MSE[:, 0].clone()
        dist.all_reduce(counts_ME, group=mesh.get_group())
        mine = counts_ME.view(len(counts_ME), mesh.size(), -1)[:, mesh.get_local_rank()]
        actual[router.layer] = mine.sum(dim=1).tolist()
        balanced[router.layer] = (counts_ME.sum(dim=1) / mesh.size()).tolist()
    order = _actions(trainer)
    layers_of_stage = {
        stage.stage_index: [router.layer for router in routers_of([stage.submod])]
        for stage in _stages(trainer.pp_schedule)
    }
    peak = _peak(order, layers_of_stage, balanced)
    result = {
        "simulated": _peak(order, layers_of_stage, actual) / peak if peak else 1.0,
        "logged": logged["moe/max_cum_overload_factor"],
        "num_actions": len(order),
    }
    trainer.close()
    return result


def _stages(schedule) -> list:
    return schedule._stages if hasattr(schedule, "_stages") else [schedule._stage]


def _actions(trainer) -> list[tuple[str, int, int]]:
    """("F" or "B", stage, micro-batch) of this pipeline rank, in order."""
    schedule = trainer.pp_schedule
    mesh = trainer.parallel_dims.get_mesh("pp")
    rank, num_stages = mesh.get_local_rank(), mesh.size()
    if isinstance(schedule, Schedule1F1B):
        num = schedule._n_microbatches
        ahead = min(num, num_stages - rank)
        order = [("F", rank, i) for i in range(ahead)]
        for i in range(num):
            order.append(("B", rank, i))
            if ahead + i < num:
                order.append(("F", rank, ahead + i))
        return order
    kinds = {
        _ComputationType.FORWARD: "F",
        _ComputationType.FULL_BACKWARD: "B",
        _ComputationType.BACKWARD_INPUT: "B",
    }
    return [
        (kinds[action.computation_type], action.stage_index, action.microbatch_index)
        for action in schedule.pipeline_order[rank]
        if action is not None and action.computation_type in kinds
    ]


def _peak(order, layers_of_stage, tokens) -> float:
    held = peak = 0.0
    for kind, stage, micro_batch in order:
        layers = layers_of_stage[stage]
        for layer in layers if kind == "F" else reversed(layers):
            held += tokens[layer][micro_batch] * (1 if kind == "F" else -1)
            peak = max(peak, held)
    assert held == 0
    return peak


def small_router(layer: int = 0, **options) -> LoadBalancedRouter:
    """A router of 8 experts on 16 features with a loss, unwired."""
    config = make_router_config(
        dim=16, num_experts=8, gate_param_init={}, top_k=2, score_func="softmax"
    )
    loss = SequenceWiseAuxLoss.Config(
        weight=0.1, local_batch_size=2, global_batch_size=2, num_experts=8
    )
    config = derive(config, LoadBalancedRouter.Config, aux_losses=[loss], layer=layer, **options)
    router = config.build()
    torch.nn.init.normal_(router.gate.weight, generator=torch.Generator().manual_seed(layer))
    return router


def collectives_of_a_logged_step(layers_by_stage: list[list[int]], ep: int) -> dict[str, Any]:
    """Count the collectives of a step that updates the bias and is logged.

    Args:
        layers_by_stage: numbers of the MoE layers of each pipeline stage.
    """
    parallelism = ParallelismConfig(
        pipeline_parallel_degree=len(layers_by_stage), expert_parallel_degree=ep
    )
    dist.init_process_group("gloo")
    parallel_dims = ParallelDims.from_config(parallelism, dist.get_world_size())
    parallel_dims.build_mesh()
    stage = parallel_dims.get_mesh("pp").get_local_rank() if parallel_dims.pp_enabled else 0
    routers = [small_router(layer) for layer in layers_by_stage[stage]]
    for router in routers:
        router.wire_meshes(parallel_dims)
    event_clock.wire(router.clock for router in routers)
    for router in routers:
        generator = torch.Generator().manual_seed(dist.get_rank())
        x_BLD = torch.randn(2, 8, 16, generator=generator, requires_grad=True)
        router(x_BLD)[0].sum().backward()
    recorder.finish_step([router.recorder for router in routers])
    event_clock.finish_step([router.clock for router in routers])
    with CommDebugMode() as of_bias_update:
        reduce_over_tokens(routers, parallel_dims)
    with CommDebugMode() as of_metrics:
        load = reduce_step(routers, parallel_dims)
    return {
        "of_bias_update": of_bias_update.get_total_counts(),
        "of_metrics": of_metrics.get_total_counts(),
        "layers": load.layers,
        "tokens": load.counts_ME.sum(axis=1).tolist(),
        "losses": {name: values.tolist() for name, values in load.losses.items()},
    }


class RefuseHostReads(TorchDispatchMode):
    """Fails on every operator that makes the host wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        waits = name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")
        by_mask = name in ("index", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if waits or by_mask or name in ("unique", "_unique2", "bincount"):
            raise AssertionError(f"{func} makes the host wait for the device")
        return func(*args, **(kwargs or {}))


def events(num_micro_batches: int, router: LoadBalancedRouter) -> dict[str, np.ndarray]:
    """The recorded step as numpy arrays."""
    found: dict[str, np.ndarray] = defaultdict()
    for name in ("forward_times_M", "backward_times_M"):
        found[name] = getattr(router.clock, name)[:num_micro_batches].numpy().copy()
    found["counts_ME"] = router.recorder.counts_MSE[:num_micro_batches, 0].numpy().copy()
    return found

"""Jobs of the telemetry tests, on the ranks of a pool."""

from __future__ import annotations

import copy
import itertools
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.config import ParallelismConfig
from torchtitan.config.override import derive
from torchtitan.distributed import ParallelDims
from torchtitan.models.common.config_utils import make_router_config
from torchtitan.models.common.moe import MoE

from model_registry.deepseek_v3 import model_registry
from tests.support.mixed_jobs import set_num_experts
from tests.support.train_jobs import build
from titan_moe_lb.balancing.expert_bias import ExpertBias
from titan_moe_lb.balancing.losses import SequenceWiseAuxLoss
from titan_moe_lb.balancing.recording.training_loop import TrainingLoop
from titan_moe_lb.balancing.router import LoadBalancedRouter, routers_of
from titan_moe_lb.balancing.step_hook import StepHook, wire
from titan_moe_lb.job import job_config
from titan_moe_lb.parallel.rank_groups import RankGroups
from titan_moe_lb.telemetry.reduction import reduce_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Device of this process; only ranks may have a GPU."""


def observed_peaks(arguments: list[str]) -> dict[str, float]:
    """Train one step; return this rank's peak of kept tokens as its pipeline stages really run.

    This is the independent reference of the cumulative overload. It uses the times at which torch
    calls forward, backward or weight pass of a stage, and its own sums over the EP group.
    """
    config = job_config.load(arguments).config
    config.training.steps = 1
    config.metrics.write_moe_trace = False
    trainer = build(config)
    logged: dict[str, Any] = {}
    trainer.metrics_processor.logger.log = lambda metrics, step: logged.update(metrics)
    order: list[tuple[str, int, int]] = []
    for stage in _stages(trainer.pp_schedule):
        _watch(stage, order)
    trainer.train()
    routers = routers_of(trainer.model_parts)
    mesh = trainer.parallel_dims.get_mesh("ep")
    actual: dict = defaultdict(lambda: defaultdict(float))
    balanced: dict = defaultdict(lambda: defaultdict(float))
    stage_of = {
        router: stage.stage_index
        for stage in _stages(trainer.pp_schedule)
        for router in routers_of([stage.submod])
    }
    counts_NME = torch.zeros(0)
    if routers:  # a pipeline rank may hold dense layers alone
        counts_NME = routers[0].step_record.step_counts_NMSE[:, :, 0].clone()
        dist.all_reduce(counts_NME, group=mesh.get_group())
    for router, counts_ME in zip(routers, counts_NME, strict=True):
        mine_ME = counts_ME.view(len(counts_ME), mesh.size(), -1)[:, mesh.get_local_rank()]
        for micro_batch, counts_E in enumerate(counts_ME):
            actual[stage_of[router]][micro_batch] += mine_ME[micro_batch].sum().item()
            balanced[stage_of[router]][micro_batch] += counts_E.sum().item() / mesh.size()
    trainer.close()
    return {
        "observed": _peak(order, actual) / _peak(order, balanced) if routers else 1.0,
        "logged": logged["moe/max_cum_overload_factor"],
        "num_events": len(order),
    }


def _stages(schedule) -> list:
    return schedule._stages if hasattr(schedule, "_stages") else [schedule._stage]


def _watch(stage, order: list[tuple[str, int, int]]) -> None:
    """Record when a stage begins to keep a micro-batch ("keep") and when it releases it
    ("free")."""
    forward, backward, weight = (
        stage.forward_one_chunk,
        stage.backward_one_chunk,
        stage.backward_weight_one_chunk,
    )

    def forward_one_chunk(micro_batch, *args, **kwargs):
        order.append(("keep", stage.stage_index, micro_batch))
        return forward(micro_batch, *args, **kwargs)

    def backward_one_chunk(micro_batch, *args, full_backward=True, **kwargs):
        result = backward(micro_batch, *args, full_backward=full_backward, **kwargs)
        if full_backward:
            order.append(("free", stage.stage_index, micro_batch))
        return result

    def backward_weight_one_chunk(micro_batch, *args, **kwargs):
        result = weight(micro_batch, *args, **kwargs)
        order.append(("free", stage.stage_index, micro_batch))
        return result

    stage.forward_one_chunk = forward_one_chunk
    stage.backward_one_chunk = backward_one_chunk
    stage.backward_weight_one_chunk = backward_weight_one_chunk


def _peak(order: list[tuple[str, int, int]], tokens: dict) -> float:
    held = peak = 0.0
    for event, stage, micro_batch in order:
        held += tokens[stage][micro_batch] * (1 if event == "keep" else -1)
        peak = max(peak, held)
    assert abs(held) < 1e-9
    return peak


def small_router(
    layer: int = 0, num_micro_batches: int = 1, track: bool = True, **options
) -> LoadBalancedRouter:
    """Wired router of 8 experts on 16 features with a loss, alone in its process."""
    config = make_router_config(
        dim=16, num_experts=8, gate_param_init={}, top_k=2, score_func="softmax"
    )
    loss = SequenceWiseAuxLoss.Config(weight=0.1, num_experts=8, top_k=2, local_batch_size=2)
    options.setdefault("aux_losses", [loss])
    options["loop"] = TrainingLoop(
        track=track,
        num_micro_batches=num_micro_batches,
    )
    router = derive(config, LoadBalancedRouter.Config, layer=layer, **options).build()
    generator = torch.Generator(router.gate.weight.device).manual_seed(layer)
    torch.nn.init.normal_(router.gate.weight, generator=generator)
    wire([router], RankGroups())
    return router


def batch(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 8, 16, generator=generator, requires_grad=True)


def selected(router: torch.nn.Module, *inputs: torch.Tensor) -> np.ndarray:
    """Counts of each batch from the router's result, not from its record."""
    with torch.no_grad():
        ids = [router.eval()(x)[1] for x in inputs]
    router.train()
    return np.stack([torch.bincount(i.flatten(), minlength=8).cpu().numpy() for i in ids])


def counts_of_a_replayed_graph() -> tuple[np.ndarray, np.ndarray]:
    """Counts of three micro-batches: from replays of a CUDA graph, and from the router's results.

    One rank with a GPU.
    """
    with torch.device("cuda"):
        router = small_router(num_micro_batches=3)
    inputs = [batch(seed).detach().cuda() for seed in range(4)]
    expected = selected(router, *inputs[1:])
    static = inputs[0].clone().requires_grad_()
    stream = torch.cuda.Stream()

    def forward_and_backward() -> None:
        torch.autograd.grad(router(static)[0].sum(), static)
        router.step_record.finish_forward(slice(None))

    with torch.cuda.stream(stream):
        forward_and_backward()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        forward_and_backward()
    router.step_record.finish_step(2)
    for x_BLD in inputs[1:]:
        with torch.no_grad():
            static.copy_(x_BLD)
        graph.replay()
    torch.cuda.synchronize()
    return router.record.counts_MSE[:, 0].cpu().numpy(), expected


def moe_layers(
    numbers: list[int],
    aux_losses=None,
    *,
    expert_bias: str | None = None,
    padded: bool = False,
    kinds: list[dict[str, Any]] | None = None,
) -> list[MoE]:
    """Build MoE layers of the tiny DeepSeek-V3 with their default balancing, 8 experts, top 2.

    They are bound to one micro-batch of 2 sequences on each rank, and not wired.

    Args:
        kinds: ``num_experts``, ``top_k``, ``groups`` (number of groups, and groups that a token
            reaches) of layers that differ, and ``bias`` False for a layer without one; the layers
            take them in turn.
    """
    layers = []
    model = {} if aux_losses is None else {"aux_losses": aux_losses}
    if expert_bias is not None:
        speed = {"speed": 1e-2} if expert_bias == "proportional" else {}
        model["expert_bias"] = ExpertBias.kinds[expert_bias].Config(**speed)
    alike = model_registry("tiny", **model).model.layers[-1].moe
    for number, kind in zip(numbers, itertools.cycle(kinds or [{}]), strict=False):
        config = copy.deepcopy(alike)
        router = config.router
        set_num_experts(config, kind.get("num_experts", 8))
        router.top_k = kind.get("top_k", 2)
        router.num_expert_groups, router.num_limited_groups = kind.get("groups", (4, 2))
        router.bind()
        for loss in router.aux_losses:
            loss.local_batch_size = 2
        if not kind.get("bias", True):
            router.expert_bias = config.load_balance_coeff = None
        config.router.layer = number
        config.router.loop = TrainingLoop(padded=padded)
        layer = config.build()
        generator = torch.Generator().manual_seed(number)
        torch.nn.init.normal_(layer.router.gate.weight, generator=generator)
        layers.append(layer.to(DEVICE))
    return layers


def forward_and_backward(layers: list[MoE]) -> None:
    """Run forward and backward of the routers alone."""
    for layer in layers:
        seed = dist.get_rank() if dist.is_initialized() else 0
        generator = torch.Generator().manual_seed(seed)
        x_BLD = torch.randn(2, 8, 64, generator=generator).to(DEVICE).requires_grad_()
        layer.router(x_BLD, layer.expert_bias_E)[0].sum().backward()


def collectives_of_a_logged_step(layers_by_stage: list[list[int]], ep: int) -> dict[str, Any]:
    """Count the collectives of a step that updates the bias and is logged.

    Args:
        layers_by_stage: numbers of the MoE layers of each pipeline stage.
    """
    parallelism = ParallelismConfig(
        pipeline_parallel_degree=len(layers_by_stage), expert_parallel_degree=ep
    )
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
    parallel_dims = ParallelDims.from_config(parallelism, dist.get_world_size())
    parallel_dims.build_mesh()
    groups = RankGroups.of(parallel_dims)
    layers = moe_layers(layers_by_stage[groups.stages.rank])
    of_bias_update = CommDebugMode()
    if layers:
        record = wire([layer.router for layer in layers], groups)
        hook = StepHook(layers, record, groups)
        forward_and_backward(layers)
        with of_bias_update:
            hook.close_step()
    with CommDebugMode() as of_metrics:
        load = reduce_step(layers, groups)
    return {
        "of_bias_update": of_bias_update.get_total_counts() if layers else None,
        "of_metrics": of_metrics.get_total_counts(),
        "layers": load.layers,
        "tokens": load.counts_ME.sum(axis=1).tolist(),
        "layer_columns": {name: values.tolist() for name, values in load.layer_columns.items()},
        "step_columns": load.step_columns,
        "micro_batch": load.micro_batch_counts_ME.tolist(),
        "mine": record.step_counts_NMSE[:, 0, 0].tolist() if layers else [],
    }


class DeviceOperators(TorchDispatchMode):
    """Counter of operators that a device would run: neither views nor queries of a dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ("detach", "_unsafe_view", "alias", "promote_types"):
            self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))

    @property
    def count(self) -> int:
        return self.names.total()

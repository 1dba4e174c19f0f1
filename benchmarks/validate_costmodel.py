"""Comparison of the cost model with a measured MoE layer under controlled imbalance.

    python -m benchmarks.validate_costmodel [--ep-degree 2] [--repetitions 9]

torchtitan's own dispatcher and grouped experts run forward and backward on this host, in EP gloo
processes of one thread each. Forced routing gives the hot experts exactly the requested share. All
imbalances run in turn, in alternating order, and the results are medians. Every time is divided by
the time at balance:

- wall: from a barrier until the last rank is done, all-to-alls included. It is reported if every
  process has its own core.
- busiest: CPU time of the busiest rank's thread. It excludes waiting, so it is fair even if
  processes share cores.
- predicted: the cost model with this host's measured peak.

Prints one line of JSON for each imbalance.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
import tyro

from titan_moe_lb.upstream import cpu

if cpu.needed():
    cpu.use_host()

from torch.distributed.device_mesh import init_device_mesh
from torchtitan.distributed.utils import set_spmd_backend
from torchtitan.models.common.moe import GroupedExperts, RoutedExperts
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

from benchmarks.host_hardware import measure_host
from titan_moe_lb.balancing.forced_routing.functional import hot_share_ids
from titan_moe_lb.costmodel.times.layer import two_level_layer_time, two_level_load
from titan_moe_lb.costmodel.times.moe_layer import MoELayer, RankRole

IMBALANCES = (1.0, 1.5, 2.0, 4.0, -1.0)


@dataclass
class Arguments:
    """Flags of the benchmark."""

    ep_degree: int = 2
    repetitions: int = 9
    num_experts: int = 16
    top_k: int = 2
    hot_experts: int = 2
    dim: int = 512
    hidden_dim: int = 1024
    tokens_per_rank: int = 2240


def main() -> None:
    """Predict and measure every imbalance, and print both."""
    arguments = tyro.cli(Arguments)
    predicted = _predict(arguments)
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    torch.multiprocessing.spawn(
        _rank, args=(arguments, _free_port(), results), nprocs=arguments.ep_degree
    )
    wall, busiest = results.get()
    for index, imbalance in enumerate(IMBALANCES):
        layer = predicted[index]
        measured = {"busiest": busiest[index] / busiest[0]}
        if arguments.ep_degree <= (os.cpu_count() or 1):
            measured["wall"] = wall[index] / wall[0]
        print(
            json.dumps(
                {
                    "ep_degree": arguments.ep_degree,
                    "imbalance": _factor(arguments, imbalance),
                    "wall_s": round(wall[index], 4),
                    "busiest_s": round(busiest[index], 4),
                    "predicted_s": round(layer, 4),
                    "predicted": round(layer / predicted[0], 3),
                    **{name: round(ratio, 3) for name, ratio in measured.items()},
                    **{
                        f"{name}_deviation_percent": round(
                            (layer / predicted[0] / ratio - 1) * 100, 1
                        )
                        for name, ratio in measured.items()
                    },
                }
            )
        )


def _factor(arguments: Arguments, imbalance: float) -> float:
    return arguments.num_experts / arguments.top_k if imbalance < 0 else imbalance


def _predict(arguments: Arguments) -> list[float]:
    """Predict the seconds of forward and backward for each imbalance, without the router."""
    torch.set_num_threads(1)
    hardware = measure_host()
    layer = MoELayer(
        num_experts=arguments.num_experts,
        top_k=arguments.top_k,
        dim=arguments.dim,
        hidden_dim=arguments.hidden_dim,
    )
    placement = RankRole(tokens_per_rank=arguments.tokens_per_rank, ep_degree=arguments.ep_degree)
    seconds = []
    for imbalance in IMBALANCES:
        load = two_level_load(layer, placement, imbalance, arguments.hot_experts)
        layer_time = two_level_layer_time(layer, placement, hardware, load)
        router = 3 * layer_time.router
        seconds.append(float(layer_time.total() - router))
    return seconds


def _rank(rank: int, arguments: Arguments, port: int, results) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    # Keep the backward in this thread, whose CPU time is measured.
    torch.autograd.set_multithreading_enabled(False)
    degree = arguments.ep_degree
    dist.init_process_group(
        "gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=degree
    )
    set_spmd_backend("partial_dtensor")
    layer = RoutedExperts.Config(
        inner_experts=GroupedExperts.Config(
            dim=arguments.dim,
            hidden_dim=arguments.hidden_dim,
            num_experts=arguments.num_experts // degree,
        ),
        token_dispatcher=AllToAllTokenDispatcher.Config(
            num_experts=arguments.num_experts, top_k=arguments.top_k
        ),
    ).build()
    layer.to(torch.bfloat16)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.02)
    mesh = init_device_mesh("cpu", (degree,), mesh_dim_names=("ep",))
    layer.token_dispatcher.wire_meshes(ep_mesh=mesh["ep"])

    cases = [_expert_ids(arguments, _factor(arguments, x)) for x in IMBALANCES]
    samples: list[list[tuple[float, float]]] = [[] for _ in cases]
    for repetition in range(arguments.repetitions + 1):
        order = range(len(cases)) if repetition % 2 else reversed(range(len(cases)))
        for case in order:
            sample = _forward_backward(layer, cases[case], arguments)
            if repetition:  # the first one warms up
                samples[case].append(sample)
    gathered: list = [None] * degree
    dist.all_gather_object(gathered, samples)
    if rank == 0:
        wall, busiest = [], []
        for case in range(len(cases)):
            by_repetition = list(zip(*(ranks[case] for ranks in gathered), strict=True))
            wall.append(statistics.median(max(w for w, _c in ranks) for ranks in by_repetition))
            # The hot experts are the first ones, so rank 0 is the busiest.
            busiest.append(statistics.median(ranks[0][1] for ranks in by_repetition))
        results.put((wall, busiest))
    dist.barrier()
    dist.destroy_process_group()


def _forward_backward(
    layer: RoutedExperts, topk_expert_ids_BLK: torch.Tensor, arguments: Arguments
) -> tuple[float, float]:
    """Run one forward and backward; return wall seconds and CPU seconds of this thread."""
    shape = (1, arguments.tokens_per_rank)
    x_BLD = torch.randn(*shape, arguments.dim, dtype=torch.bfloat16, requires_grad=True)
    scores_BLK = torch.rand(*shape, arguments.top_k, requires_grad=True)
    counts_E = torch.bincount(topk_expert_ids_BLK.flatten(), minlength=arguments.num_experts)
    gradient_BLD = torch.ones(*shape, arguments.dim, dtype=torch.bfloat16)
    layer.zero_grad()
    dist.barrier()
    started, processor = time.perf_counter(), time.thread_time()
    layer(x_BLD, scores_BLK, topk_expert_ids_BLK, counts_E).backward(gradient_BLD)
    used = time.thread_time() - processor
    dist.barrier()
    return time.perf_counter() - started, used


def _expert_ids(arguments: Arguments, factor: float) -> torch.Tensor:
    """Expert ids ``(1, T, K)``: the first W experts get ``factor`` x the mean, the others even."""
    tokens, top_k, hot = arguments.tokens_per_rank, arguments.top_k, arguments.hot_experts
    return hot_share_ids(
        torch.arange(tokens),
        top_k,
        torch.arange(hot),
        torch.arange(hot, arguments.num_experts),
        num_hot_choices=round(hot * factor * tokens * top_k / arguments.num_experts),
        total_tokens=tokens,
    ).unsqueeze(0)


def _free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


if __name__ == "__main__":
    main()

"""Cost of a router on the host: operators and eager time of a forward and backward.

    python -m benchmarks.router_cost [--repeats 2000]

Compares four routers of DeepSeek-V3's kind: 256 experts, top 8, group-limited, sigmoid scores,
normalized and scaled. They are torchtitan's router, and ours with the metrics alone, with
DeepSeek-V3's loss, and with three losses. There are so few tokens that issuing the operators is
the only cost. Operators are counted without views. The routers run in turn on one thread, in
rotating order. The ratio is the median over repeats of a router's time to torchtitan's in the
same repeat. Prints a table.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro

from titan_moe_lb.upstream import cpu

if cpu.needed():
    cpu.use_host()

from torchtitan.config.override import derive
from torchtitan.models.common.config_utils import make_router_config
from torchtitan.models.common.moe import TokenChoiceTopKRouter

from benchmarks.device_time import interleaved
from tests.support.telemetry_jobs import DeviceOperators
from titan_moe_lb.balancing.losses import (
    AuxLoss,
    GlobalBatchAuxLoss,
    RouterZLoss,
    SequenceWiseAuxLoss,
)
from titan_moe_lb.balancing.recording.training_loop import TrainingLoop
from titan_moe_lb.balancing.router import LoadBalancedRouter
from titan_moe_lb.balancing.step_hook import wire
from titan_moe_lb.parallel.rank_groups import RankGroups

EXPERTS, TOP_K, DIM = 256, 8, 32
SEQUENCES, LENGTH = 2, 2
BASELINE = "torchtitan's router"


@dataclass
class Arguments:
    """Flags of the benchmark."""

    repeats: int = 2000


def main() -> None:
    """Measure all routers, and print the table."""
    arguments = tyro.cli(Arguments)
    torch.set_num_threads(1)
    compared = routers()
    steps = {name: _step(router) for name, router in compared.items()}
    for step in [*steps.values()] * 100:  # warm up
        step()
    operators = {}
    for name, step in steps.items():
        with DeviceOperators() as counted:
            step()
        operators[name] = counted.count
    seconds = interleaved(steps, arguments.repeats, torch.device("cpu"))
    print("| | operators | host time | of torchtitan's | quartiles |\n|---|---|---|---|---|")
    for name in steps:
        ratios = [own / base for own, base in zip(seconds[name], seconds[BASELINE], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"| {name} | {operators[name]} | {statistics.median(seconds[name]) * 1e6:.0f} us | "
            f"{middle:.2f} | {low:.2f} to {high:.2f} |"
        )


def routers() -> dict[str, TokenChoiceTopKRouter]:
    """Build the four routers, by their names in the table."""
    bound = {"num_experts": EXPERTS, "top_k": TOP_K}
    sequence_wise = SequenceWiseAuxLoss.Config(weight=1e-4, count_from="scores", **bound)
    three = [
        sequence_wise,
        GlobalBatchAuxLoss.Config(weight=1e-3, **bound),
        RouterZLoss.Config(weight=1e-4, **bound),
    ]
    return {
        BASELINE: _router(),
        "ours, metrics alone": _balanced([]),
        "ours, DeepSeek-V3's default": _balanced([sequence_wise]),
        "ours, three losses": _balanced(three),
    }


def _config() -> TokenChoiceTopKRouter.Config:
    return make_router_config(
        dim=DIM,
        num_experts=EXPERTS,
        gate_param_init={},
        top_k=TOP_K,
        score_func="sigmoid",
        num_expert_groups=8,
        num_limited_groups=4,
        route_norm=True,
        route_scale=2.5,
    )


def _router() -> TokenChoiceTopKRouter:
    return _initialised(_config().build())


def _balanced(losses: list[AuxLoss.Config]) -> LoadBalancedRouter:
    loop = TrainingLoop(num_micro_batches=4)
    config = derive(_config(), LoadBalancedRouter.Config, aux_losses=losses, loop=loop)
    router = _initialised(config.build())
    record = wire([router], RankGroups())
    record.weights_A.copy_(torch.tensor([loss.weight / SEQUENCES for loss in losses]))
    return router


def _initialised(router: TokenChoiceTopKRouter) -> TokenChoiceTopKRouter:
    torch.nn.init.normal_(router.gate.weight, generator=torch.Generator().manual_seed(0))
    return router


def _step(router: TokenChoiceTopKRouter) -> Callable[[], None]:
    """Build a forward and backward that accumulates into existing gradients."""
    x_BLD = torch.randn(SEQUENCES, LENGTH, DIM, requires_grad=True)
    bias_E = torch.zeros(EXPERTS)
    ones_BLK = torch.ones(SEQUENCES, LENGTH, TOP_K)

    def step() -> None:
        router(x_BLD, bias_E)[0].backward(ones_BLK)

    return step


if __name__ == "__main__":
    main()

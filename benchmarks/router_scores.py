"""Cost of the metrics of scores in a compiled router: a step that records them, beside one that does not.

    python -m benchmarks.router_scores [--repeats 40]

One router runs forward and backward in two compiled graphs, in turn. The ratio is the median over repeats
of the two times of a repeat. Prints a table.
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

from benchmarks.device_time import interleaved
from titan_moe_lb.balancing.losses import SequenceWiseAuxLoss
from titan_moe_lb.balancing.recording.training_loop import TrainingLoop
from titan_moe_lb.balancing.router import LoadBalancedRouter
from titan_moe_lb.balancing.step_hook import wire
from titan_moe_lb.parallel.rank_groups import RankGroups

DIM = 2048
ROUTERS = {
    "64 experts, top 8, softmax, 4,096 tokens": (4096, 64, "softmax", {}),
    "256 experts, top 8, sigmoid, 4 of 8 groups, 2,048 tokens": (
        2048,
        256,
        "sigmoid",
        {"num_expert_groups": 8, "num_limited_groups": 4},
    ),
}


@dataclass
class Arguments:
    """Flags of the benchmark."""

    repeats: int = 40


def main() -> None:
    """Measure both routers, and print the table."""
    arguments = tyro.cli(Arguments)
    torch.set_num_threads(1)
    print("| router | a step that records, of one that does not | quartiles |\n|---|---|---|")
    for name, (tokens, num_experts, score_func, options) in ROUTERS.items():
        steps = _steps(tokens, num_experts, score_func, options)
        for step in [*steps.values()] * 5:  # compile and warm up
            step()
        seconds = interleaved(steps, arguments.repeats, torch.device("cpu"))
        ratios = [a / b for a, b in zip(seconds["on"], seconds["off"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"| {name} | {middle:.3f} | {low:.3f} to {high:.3f} |")


def _steps(
    tokens: int, num_experts: int, score_func: str, options: dict[str, int]
) -> dict[str, Callable[[], None]]:
    top_k = 8
    gate = make_router_config(
        dim=DIM,
        num_experts=num_experts,
        gate_param_init={},
        top_k=top_k,
        score_func=score_func,
        **options,
    )
    loss = SequenceWiseAuxLoss.Config(weight=1e-4, num_experts=num_experts, top_k=top_k)
    loop = TrainingLoop(scores_every=2)
    router = derive(gate, LoadBalancedRouter.Config, aux_losses=[loss], loop=loop).build()
    torch.nn.init.normal_(router.gate.weight, std=DIM**-0.5)
    record = wire([router], RankGroups())
    compiled = torch.compile(router, fullgraph=True)
    x_BLD = torch.randn(1, tokens, DIM, requires_grad=True)
    bias_E, ones_BLK = torch.zeros(num_experts), torch.ones(1, tokens, top_k)

    def step(records: bool) -> None:
        record.records_scores = records
        compiled(x_BLD, bias_E)[0].backward(ones_BLK)

    return {"on": lambda: step(True), "off": lambda: step(False)}


if __name__ == "__main__":
    main()

"""Cost of a router loss: forward and backward of one router, with and without the loss.

    python -m benchmarks.aux_loss [--repeats 20] [--device cpu|cuda] [--compile] [--markdown]

The columns are torchtitan's bare router, and ours with each loss. Further columns compute the
sequence-wise loss and the z-loss by textbook autograd. One computes the sequence-wise loss by
``torch.func.grad`` in the backward of an autograd Function. The last one calls
``load_balancing_loss_func`` of transformers.

The variants are interleaved. A column is the time added to the bare router in the same repeat, as
the median over repeats. Saved memory is the memory that autograd keeps between forward and
backward, beyond the bare router's.

CUDA adds two numbers. One is the peak of allocated memory beyond the bare router's. The other is
the share of the memory-bandwidth bound. The bound is the least traffic of a router's forward and
backward, at the bandwidth of a copy; the share is the bound over the measured time.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro

from benchmarks.device_time import copy_bandwidth, device_name, interleaved
from titan_moe_lb.upstream import cpu

if cpu.needed():
    cpu.use_host()

from torchtitan.config.override import derive
from torchtitan.models.common.config_utils import make_router_config
from torchtitan.models.common.moe import TokenChoiceTopKRouter
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from titan_moe_lb.balancing.losses import (
    AuxLoss,
    BatchWiseAuxLoss,
    GlobalBatchAuxLoss,
    RouterZLoss,
    SequenceWiseAuxLoss,
    functional,
)
from titan_moe_lb.balancing.router import LoadBalancedRouter
from titan_moe_lb.balancing.step_hook import wire
from titan_moe_lb.parallel.rank_groups import RankGroups

# Tokens, experts, top_k.
SHAPES = [(16384, 64, 6), (16384, 128, 8), (8192, 256, 8)]
SEQUENCES = 4
OURS = {
    "sequence_wise": SequenceWiseAuxLoss,
    "batch_wise": BatchWiseAuxLoss,
    "global_batch": GlobalBatchAuxLoss,
    "z_loss": RouterZLoss,
}
WEIGHT = 1e-3


@dataclass
class Arguments:
    """Flags of the benchmark."""

    repeats: int = 20
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dim: int = 2048
    """Model width, the input size of the gate. A small one raises the share of a loss."""
    compile: bool = False
    """Compile every variant."""
    markdown: bool = False
    """Print a table instead of JSON lines."""


def main() -> None:
    """Measure all shapes, and print a row for each."""
    arguments = tyro.cli(Arguments)
    for shape in SHAPES:
        row = measure(*shape, arguments)
        print(_markdown(row) if arguments.markdown else json.dumps(row), flush=True)


def measure(tokens: int, num_experts: int, top_k: int, arguments: Arguments) -> dict:
    """Measure all variants on one shape."""
    device = torch.device(arguments.device)
    dim = arguments.dim
    x = torch.randn(SEQUENCES, tokens // SEQUENCES, dim, device=device, requires_grad=True)
    variants = _variants(num_experts, top_k, dim, device)
    if arguments.compile:
        variants = {name: torch.compile(run) for name, run in variants.items()}
    seconds = interleaved(
        {name: lambda run=run: _step(run, x) for name, run in variants.items()},
        arguments.repeats,
        device,
    )
    bare = seconds["bare"]
    row = {
        "device": device_name(device),
        "shape": {"tokens": tokens, "experts": num_experts, "top_k": top_k, "dim": dim},
        "bare_ms": statistics.median(bare) * 1e3,
        "bare_spread_percent": _spread(bare),
        "scores_bytes": tokens * num_experts * 4,
        "added_percent": {},
        "added_spread_percent": {},
        "saved_bytes": {},
    }
    saved = {name: _saved_bytes(run, x) for name, run in variants.items()}
    if device.type == "cuda":
        bound = _least_bytes(tokens, num_experts, top_k, dim) / copy_bandwidth(device)
        peaks = {name: _peak_bytes(run, x) for name, run in variants.items()}
        row["bandwidth_bound_percent"] = {
            name: bound / statistics.median(samples) * 100 for name, samples in seconds.items()
        }
        row["peak_bytes"] = {name: peak - peaks["bare"] for name, peak in peaks.items()}
    for name, samples in seconds.items():
        if name == "bare":
            continue
        added = [(s - b) / b * 100 for s, b in zip(samples, bare, strict=True)]
        row["added_percent"][name] = statistics.median(added)
        quartiles = statistics.quantiles(added, n=4)
        row["added_spread_percent"][name] = quartiles[2] - quartiles[0]
        row["saved_bytes"][name] = saved[name] - saved["bare"]
    return row


Run = Callable[[torch.Tensor], torch.Tensor]


def _variants(num_experts: int, top_k: int, dim: int, device: torch.device) -> dict[str, Run]:
    bare = _router(num_experts, top_k, dim, device)

    def textbook(x: torch.Tensor) -> torch.Tensor:
        topk_scores, ids, scores = bare(x)
        return topk_scores.sum() + WEIGHT * functional.sequence_wise_load_balance(scores, ids)

    def func_grad(x: torch.Tensor) -> torch.Tensor:
        topk_scores, ids, scores = bare(x)
        return _InjectByFuncGrad.apply(topk_scores, scores, ids).sum()

    def transformers_loss(x: torch.Tensor) -> torch.Tensor:
        topk_scores, _ids, scores = bare(x)
        # The function expects logits and applies the softmax; log-probabilities are logits.
        logits = scores.flatten(0, 1).log()
        return topk_scores.sum() + WEIGHT * load_balancing_loss_func((logits,), num_experts, top_k)

    def textbook_z_loss(x: torch.Tensor) -> torch.Tensor:
        logits = bare.gate(x)
        scores = logits.softmax(-1)
        ids = scores.topk(top_k, dim=-1, sorted=False).indices
        topk_scores = scores.gather(-1, ids) * bare.route_scale
        return topk_scores.sum() + WEIGHT * functional.router_z_loss(logits)

    variants: dict[str, Run] = {"bare": lambda x: bare(x)[0].sum()}
    for name, loss in OURS.items():
        router = _router(num_experts, top_k, dim, device, loss)
        variants[name] = lambda x, router=router: router(x)[0].sum()
    return variants | {
        "textbook autograd": textbook,
        "textbook autograd, z-loss": textbook_z_loss,
        "torch.func.grad": func_grad,
        "transformers": transformers_loss,
    }


class _InjectByFuncGrad(torch.autograd.Function):
    """Gradient injection without a closed form: differentiate the loss in the backward."""

    @staticmethod
    def forward(ctx, topk_scores, scores, ids):
        ctx.save_for_backward(scores, ids)
        return topk_scores.view_as(topk_scores)

    @staticmethod
    def backward(ctx, grad):
        scores, ids = ctx.saved_tensors
        loss_grad = torch.func.grad(functional.sequence_wise_load_balance)(scores, ids)
        return grad, WEIGHT * loss_grad, None


def _router(
    num_experts: int,
    top_k: int,
    dim: int,
    device: torch.device,
    loss: type[AuxLoss] | None = None,
) -> TokenChoiceTopKRouter:
    config = make_router_config(
        dim=dim, num_experts=num_experts, gate_param_init={}, top_k=top_k, score_func="softmax"
    )
    if loss is not None:
        bound = loss.Config(
            weight=WEIGHT,
            num_experts=num_experts,
            top_k=top_k,
        )
        config = derive(config, LoadBalancedRouter.Config, aux_losses=[bound])
    router = config.build().to(device)
    torch.manual_seed(0)
    torch.nn.init.normal_(router.gate.weight, std=dim**-0.5)
    if loss is not None:
        wire([router], RankGroups()).weights_A.fill_(WEIGHT / SEQUENCES)
    return router


def _step(run: Run, x: torch.Tensor) -> None:
    x.grad = None
    run(x).backward()


def _saved_bytes(run: Run, x: torch.Tensor) -> int:
    """Bytes of distinct storages that autograd keeps for the backward."""
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run(x)
    return sum(storages.values())


def _peak_bytes(run: Run, x: torch.Tensor) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _step(run, x)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _least_bytes(tokens: int, num_experts: int, top_k: int, dim: int) -> int:
    """Least bytes that a router's forward and backward must read and write, in float32."""
    inputs = 3 * tokens * dim  # read for logits and weight gradient; input gradient written
    weight = 3 * num_experts * dim  # read twice, its gradient written
    scores = 5 * tokens * num_experts  # written, read twice; the gradient written and read
    selected = 4 * tokens * top_k  # scores and their gradient, written and read
    ids = 3 * tokens * top_k  # int64: written, read by both gathers
    return 4 * (inputs + weight + scores + selected) + 8 * ids


def _spread(samples: list[float]) -> float:
    low, _, high = statistics.quantiles(samples, n=4)
    return (high - low) / statistics.median(samples) * 100


def _markdown(row: dict) -> str:
    shape = row["shape"]
    head = (
        f"T={shape['tokens']}, E={shape['experts']}, K={shape['top_k']}, D={shape['dim']} on "
        f"{row['device']}: bare {row['bare_ms']:.1f} ms (quartiles {row['bare_spread_percent']:.1f}% "
        f"apart), scores {row['scores_bytes'] / 2**20:.1f} MiB\n\n"
        "| | added to forward + backward | quartiles apart | added saved memory |\n|---|---|---|---|"
    )
    lines = [
        f"| {name} | {added:+.1f}% | {row['added_spread_percent'][name]:.1f}% | "
        f"{row['saved_bytes'][name] / 1024:,.0f} KiB |"
        for name, added in row["added_percent"].items()
    ]
    return "\n".join([head, *lines, ""])


if __name__ == "__main__":
    main()

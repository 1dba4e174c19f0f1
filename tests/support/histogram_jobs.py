"""Jobs of the tests of the histogram's bytes, for the ranks of a pool."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.telemetry_jobs import forward_and_backward, moe_layers
from titan_moe_lb.balancing.recording.step_record import StepRecord
from titan_moe_lb.balancing.step_hook import StepHook, wire
from titan_moe_lb.parallel.rank_groups import RankGroups


class SentTensors(TorchDispatchMode):
    """Records dtype and bytes of every tensor that is summed over ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[torch.dtype, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "allreduce" in func.overloadpacket.__name__:
            self.sent += [(tensor.dtype, tensor.nbytes) for tensor in args[0]]
        return func(*args, **(kwargs or {}))


def sums_of_a_step_end(rule: str) -> tuple[list, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Close a step of three layers with a bias rule on all ranks.

    Returns:
        What was sent, this rank's histogram before, the sum over the ranks, and the biases.
    """
    dist.init_process_group("gloo")
    layers = moe_layers([0, 1, 2], [], expert_bias=rule)
    groups = RankGroups.each_alone()
    record = wire([layer.router for layer in layers], groups)
    hook = StepHook(layers, record, groups)
    forward_and_backward(layers)
    mine = record.histogram_NEH.clone()
    total = mine.clone()
    dist.all_reduce(total)
    with SentTensors() as sent:
        hook.close_step()
    return sent.sent, mine, total, torch.stack([layer.expert_bias_E for layer in layers])


def sums_of_a_large_step(sizes: dict[str, int]) -> tuple[list, int]:
    """Sum a record of these sizes over the ranks: what was sent, and the tokens of a full bin."""
    dist.init_process_group("gloo")
    record = StepRecord(**sizes, num_micro_batches=1, token_shape=None, device=torch.device("cpu"))
    # Each rank has half of the most tokens, all in one bin.
    record.histogram_NEH[0, 0, 0] = 2**30 - dist.get_rank()
    group = RankGroups.each_alone().tokens
    with SentTensors() as sent:
        record.finish_step(1)
        record.reduce(group)
        record.reduce_histogram(group)
    return sent.sent, int(record.histogram_NEH[0, 0, 0])

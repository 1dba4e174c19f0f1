"""Uneven all-to-all on gloo.

Upstream fact: spmd_types exchanges tokens by ``torch.distributed.all_to_all`` with lists of
tensors of unequal sizes, which gloo rejects. gloo accepts ``all_to_all_single`` with split sizes.
``set_dist`` of spmd_types replaces the collectives that it calls.
"""

from __future__ import annotations

from types import ModuleType

import spmd_types._dist
import torch
import torch.distributed as dist


class GlooCollectives(ModuleType):
    """``torch.distributed`` with an ``all_to_all`` that gloo accepts."""

    def __init__(self) -> None:
        super().__init__("titan_moe_lb.upstream.cpu.gloo_collectives")

    def __getattr__(self, name: str):
        return getattr(dist, name)

    @staticmethod
    def all_to_all(
        output_tensor_list: list[torch.Tensor],
        input_tensor_list: list[torch.Tensor],
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Exchange one tensor with each rank of ``group``; shapes may differ by rank."""
        received = torch.cat([t.new_empty(t.numel()) for t in output_tensor_list])
        dist.all_to_all_single(
            received,
            torch.cat([t.reshape(-1) for t in input_tensor_list]),
            output_split_sizes=[t.numel() for t in output_tensor_list],
            input_split_sizes=[t.numel() for t in input_tensor_list],
            group=group,
        )
        sizes = [t.numel() for t in output_tensor_list]
        for output, chunk in zip(output_tensor_list, received.split(sizes), strict=True):
            output.copy_(chunk.view_as(output))


def use_gloo_all_to_all() -> None:
    """Make spmd_types call :class:`GlooCollectives`."""
    spmd_types._dist.set_dist(GlooCollectives())

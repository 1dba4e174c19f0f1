"""Collectives of torchtitan on gloo.

Upstream facts:

- spmd_types exchanges tokens by ``torch.distributed.all_to_all`` with lists of tensors of unequal
  sizes, which gloo rejects. gloo accepts ``all_to_all_single`` with split sizes. ``set_dist`` of
  spmd_types replaces the collectives that it calls.
- torchtitan sets FSDP's gradient divide factor to 1, which torch implements with a pre-multiplied
  sum (``PREMUL_SUM``). gloo has no such reduction. A setting of FSDP makes it use a plain sum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType

import spmd_types._dist
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule


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


def with_sum_reduction(parallelize: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Wrap a ``ModelSpec.parallelize_fn`` so that FSDP reduces gradients by a plain sum."""

    @functools.wraps(parallelize)
    def parallelize_on_host(model: nn.Module, **kwargs: object) -> nn.Module:
        model = parallelize(model, **kwargs)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
        return model

    return parallelize_on_host

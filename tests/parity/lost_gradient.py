"""Lost gradient in torch alone, the reason why :mod:`titan_moe_lb.rules.spmd_backend` refuses a
job."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.experimental import local_map


def gradient(rows: int) -> torch.Tensor:
    """Compute the gradient of ``x + f(x)`` in x ``(rows, 4, 3)``; f computes x on local tensors.
    Two ranks."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    half = local_map(
        lambda local: local * 0.5,  # of a sum over the two ranks
        out_placements=[Partial()],
        in_placements=([Replicate()],),
        in_grad_placements=([Partial()],),
        device_mesh=mesh,
    )
    x = distribute_tensor(torch.ones(rows, 4, 3), mesh, [Shard(1)]).requires_grad_()
    gathered = x.redistribute(mesh, [Replicate()], async_op=True)
    (gathered + half(gathered)).sum().backward()
    return x.grad.full_tensor()

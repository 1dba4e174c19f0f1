"""Local shards of distributed tensors."""

from __future__ import annotations

import spmd_types as spmd
import torch
from spmd_types.runtime import get_local_type, get_partition_spec
from torch.distributed.tensor import DTensor


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """Return the local tensor of a DTensor, or a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed_as(reference: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """Place (and SPMD-type) a local tensor like the tensor that it was computed from."""
    if isinstance(reference, DTensor):
        mesh, placements = reference.device_mesh, reference.placements
        return DTensor.from_local(local, mesh, placements, run_check=False)
    if spmd.is_type_checking():
        spmd.assert_type(local, get_local_type(reference), get_partition_spec(reference))
    return local

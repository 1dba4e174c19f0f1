"""The part of a tensor that this rank holds."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """The local tensor of a DTensor; a plain tensor is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

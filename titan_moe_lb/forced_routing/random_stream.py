"""The random numbers of one router on one rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torchtitan.protocols.module import Module

from titan_moe_lb.forced_routing.functional import hash_seed
from titan_moe_lb.parallel import layout


class RandomStream(Module):
    """Two seeds of a router: one of this rank's tokens, one that all ranks share.

    Ranks that see the same tokens (TP without EP) have the same seeds.

    Attributes:
        own_seed, shared_seed: int64 ``()``; see :mod:`titan_moe_lb.forced_routing.functional`.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        seed: int

    own_seed: torch.Tensor
    shared_seed: torch.Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._seed = config.seed
        for name in ("own_seed", "shared_seed"):
            zero = torch.zeros((), dtype=torch.int64)
            self.register_buffer(name, zero, persistent=False)

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        device = buffer_device or self.own_seed.device
        for name in ("own_seed", "shared_seed"):
            setattr(self, name, torch.zeros((), dtype=torch.int64, device=device))

    def wire(self, parallel_dims, layer: int) -> None:
        """Args: as :meth:`titan_moe_lb.forced_routing.ForcedRouting.wire`."""
        place = 0
        for axis in layout.token_axes(parallel_dims):
            mesh = parallel_dims.get_mesh(axis)
            place = place * mesh.size() + mesh.get_local_rank()
        self.shared_seed.fill_(hash_seed(self._seed, layer))
        self.own_seed.fill_(hash_seed(self._seed, layer, place + 1))

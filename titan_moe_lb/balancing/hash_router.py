"""Routers that choose experts by token id: their tokens are counted, and nothing balances them.

DeepSeek-V4 routes its first layers by a table from token ids to experts. A torchtitan router of
this kind (pull request 3634) has a ``layer_id`` below its ``n_hash_layers``.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from titan_moe_lb.balancing.recording.recomputation import is_recomputation, saved_decision
from titan_moe_lb.balancing.router import LoadBalancedRouter
from titan_moe_lb.parallel.local_shard import local_shard, untyped


def is_hash_router(router: Any) -> bool:
    """Return True if routers of this ``TokenChoiceTopKRouter.Config`` choose experts by token id."""
    return getattr(router, "layer_id", 0) < getattr(router, "n_hash_layers", 0)


@functools.cache
def counted(own: Any) -> type[LoadBalancedRouter]:
    """Derive a class that routes as a user's hash router does, and counts the tokens."""
    base = LoadBalancedRouter.Config
    known = {field.name for field in dataclasses.fields(base)}
    extra = [
        (field.name, field.type, dataclasses.field(kw_only=True))
        for field in dataclasses.fields(own.Config)
        if field.name not in known
    ]

    class Counted(own, LoadBalancedRouter):  # type: ignore[misc, valid-type]
        Config: Any = dataclasses.make_dataclass(  # type: ignore[assignment]
            f"Counted{own.__name__}Config", extra, bases=(base,), kw_only=True, slots=True
        )

        def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
            result = own.forward(self, *args, **kwargs)
            with untyped(), torch.no_grad():
                _count(self, local_shard(result[1]))
            return result

    Counted.__qualname__ = f"Counted{own.__qualname__}"
    return Counted


def _count(router: LoadBalancedRouter, ids_BLK: torch.Tensor) -> None:
    """Count the tokens of a forward, once."""
    if not router._learns:
        router._count_held_out(ids_BLK)
        return
    router._check_loop()
    tokens = saved_decision(router._saved_tokens) if router.needs_tokens else None
    if router.record is not None and not is_recomputation():
        router.sources.count(ids_BLK, lambda: ids_BLK, tokens, router.record)

"""Base class of the forced strategies."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from titan_moe_lb.balancing.component import Component
from titan_moe_lb.errors import JobError
from titan_moe_lb.parallel.batch_cut import Cut
from titan_moe_lb.parallel.rank_groups import RankGroups


class ForcedRouting(Component):
    """Base class of strategies that choose the experts instead of the router, for a benchmark.

    The scores remain the router's. Their gradients flow, and the scores of the forced experts are
    gathered and normalized as usual. A user's strategy is a subclass with a ``type_name``.
    """

    kinds: ClassVar[dict[str, type[ForcedRouting]]] = {}
    """Configurable strategies, by ``type_name``."""

    filled_by_job: ClassVar[frozenset[str]] = frozenset(
        {"num_experts", "top_k", "open_groups", "batch_cut"}
    )
    """Fields of the Config that the router and ``update_from_config`` fill."""

    @dataclass(kw_only=True, slots=True)
    class Config(Component.Config):
        num_experts: int | None = None
        """E of the router. Filled by ``update_from_config``."""

        top_k: int | None = None
        """K of the router. Filled by ``update_from_config``."""

        open_groups: int | None = None
        """Expert groups that a token may reach; None: all. Filled by the router."""

        batch_cut: Cut | None = None
        """Cut of the job's global batch. Filled by the router."""

        def update_from_config(self, *, config, num_experts: int, top_k: int) -> None:
            """Fill the fields that depend on a ``Trainer.Config`` and on the router."""
            self.num_experts = num_experts
            self.top_k = top_k

        def tensors(self) -> dict[str, torch.Tensor]:
            """Return the strategy's tensors, by the name of their buffer."""
            return {}

    def __init__(self, config: Config) -> None:
        super().__init__()
        if config.num_experts is None or config.top_k is None:
            raise JobError(
                "forced routing needs torchtitan's Trainer, because it depends on how a job cuts its batch"
            )
        self.config = config
        self.num_experts = config.num_experts
        self.top_k = config.top_k
        self._init_self_buffers()

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        """Create the buffers; torchtitan calls this again when it initializes a model."""
        for name, tensor in self.config.tensors().items():
            device = buffer_device or getattr(self, name, tensor).device
            self.register_buffer(name, tensor.to(device), persistent=False)

    def wire(self, groups: RankGroups, layer: int) -> None:
        """Read this rank's position in the job, once before training."""

    def forward(
        self,
        scores_BLE: torch.Tensor,
        forward_number: torch.Tensor,
        limit_groups: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Choose the experts of every token.

        Args:
            scores_BLE: local scores ``(B, L, E)``, for their shape and device.
            forward_number: earlier forwards of this router, int64 ``()``, with those before the
                checkpoint of a resumed job.
            limit_groups: function that masks scores ``(B, L, E)`` as group-limited routing does.

        Returns:
            ``(B, L, K)`` int64, distinct in a token.
        """
        raise NotImplementedError


def announce(strategies: Sequence[ForcedRouting | None]) -> None:
    """Warn that a run is a benchmark."""
    forced = [strategy.config.describe() for strategy in strategies if strategy is not None]
    for strategy in set(forced):
        logging.getLogger().warning(
            f"FORCED ROUTING: {strategy} decides where tokens go in {forced.count(strategy)} MoE "
            "layers. This run is a benchmark: its model is not worth keeping"
        )


def require_at_least_one(strategy: str, **values: int) -> None:
    """Raise ``JobError`` for a key below 1."""
    for key, value in values.items():
        if value < 1:
            raise JobError(f"{strategy} {key} is {value}; it must be at least 1")


def require_share(strategy: str, fraction: float) -> None:
    """Raise ``JobError`` for a fraction outside (0, 1]."""
    if not 0 < fraction <= 1:
        raise JobError(f"{strategy} fraction is {fraction}; it must be in (0, 1]")

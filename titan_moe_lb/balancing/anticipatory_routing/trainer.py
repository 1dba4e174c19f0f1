"""torchtitan's Trainer with a forward ahead, whose experts train the batch later.

A batch that was read carries its experts until it is trained on: ``2 K`` bytes a token and MoE
layer on the device, for ``delay + 1`` steps. Old parameters are not copied.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torchtitan.components.dataloader import DataloaderExhaustedError
from torchtitan.config.override import derive
from torchtitan.trainer import Trainer

from titan_moe_lb.balancing.anticipatory_routing.read_ahead import read_ahead
from titan_moe_lb.balancing.recording.replayed import RouterReplay
from titan_moe_lb.balancing.router import LoadBalancedRouter, routers_of

EXPERTS = "anticipated_experts"
"""Key of a batch: its experts by layer, int16 ``(B, L, K)``. It never reaches the model."""

Batch = tuple[dict[str, Any], torch.Tensor]


def with_forward_ahead(config: Trainer.Config) -> Trainer.Config:
    """Derive a job's Config whose Trainer routes as ``[model] routing`` says.

    The same Config is returned for a model without that setting.
    """
    if getattr(config.model_spec, "routing", None) is None or runs_ahead(config):
        return config
    return derive(config, _ahead(config._owner).Config)


def runs_ahead(config: Trainer.Config) -> bool:
    """Return True if the Trainer of a job has the forward ahead."""
    return getattr(config._owner, "runs_forward_ahead", False)


@functools.cache
def _ahead(trainer: type[Any]) -> type[Any]:
    class AheadTrainer(trainer):
        runs_forward_ahead: ClassVar[bool] = True
        ntokens_seen: int

        @dataclass(kw_only=True, slots=True)
        class Config(trainer.Config):  # type: ignore[name-defined]
            """Settings of the Trainer."""

        def batch_generator(self, data_iterable: Iterable[Any]) -> Iterator[Batch]:
            """Read batches ahead, with their experts."""
            metrics = self.metrics_processor
            batches = read_ahead(
                super().batch_generator(data_iterable),
                self._look_ahead,
                delay=self.config.model_spec.routing.delay,
                steps=self.config.training.steps - max(self.step - 1, 0),
                batches_per_step=self.gradient_accumulation_steps,
                end=DataloaderExhaustedError,
            )
            for input_dict, labels in batches:
                metrics.ntokens_since_last_log += labels.numel()
                if not metrics.data_loading_times:  # torchtitan divides by their number
                    metrics.data_loading_times.append(0.0)
                yield input_dict, labels

        def post_dataloading_process(
            self, input_dict: dict[str, Any], labels: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
            """Give the experts of a batch to the routers, before its training forward."""
            for router, ids_BLK in zip(self._routers, input_dict.pop(EXPERTS), strict=True):
                router.replay.expert_ids_BLK = ids_BLK.long()  # type: ignore[union-attr]
            return super().post_dataloading_process(input_dict, labels)

        def forward_backward_step(self, **batch: Any) -> torch.Tensor:
            """Train with the experts of the batch; other forwards choose their own."""
            try:
                return super().forward_backward_step(**batch)
            finally:
                for router in self._routers:
                    router.replay.expert_ids_BLK = None  # type: ignore[union-attr]

        def _look_ahead(self, batch: Batch) -> None:
            """Add the experts that the present parameters choose to a batch."""
            input_dict, labels = batch
            tokens_seen = self.ntokens_seen
            on_device = {
                name: value.to(self.device) if torch.is_tensor(value) else value
                for name, value in input_dict.items()
            }
            inputs, _labels, others = super().post_dataloading_process(
                on_device, labels.to(self.device)
            )
            for router in self._routers:
                router.replay.notes = True  # type: ignore[union-attr]
            with torch.no_grad(), self.train_context():
                self.model_parts[0](inputs, **others)
            input_dict[EXPERTS] = [_taken(router.replay) for router in self._routers]
            # Its tokens count in the step that trains on it.
            self.ntokens_seen = tokens_seen
            self.metrics_processor.ntokens_since_last_log -= labels.numel()

        @functools.cached_property
        def _routers(self) -> list[LoadBalancedRouter]:
            routers = routers_of(self.model_parts)
            for router in routers:
                router.replay = RouterReplay()
                router.replay.changed_2 = torch.zeros(2, dtype=torch.int64, device=self.device)
            return routers

    AheadTrainer.__qualname__ = trainer.__qualname__
    return AheadTrainer


def _taken(replay: Any) -> torch.Tensor:
    """Take the recorded experts from a router, int16 ``(B, L, K)``."""
    ids_BLK, replay.seen_BLK, replay.notes = replay.seen_BLK.short(), None, False
    return ids_BLK

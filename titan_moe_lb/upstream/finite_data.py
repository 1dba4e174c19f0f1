"""Finite data: a whole validation set (``validator.steps = -1``), or a finite training set.

In torchtitan 0.3.0, each data-parallel rank stops when its own data end. Ranks with another batch
then wait for it in a collective (https://github.com/pytorch/torchtitan/issues/1618). Here, all
ranks stop with the first one: before each batch, they agree that each of them has one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.validate import Validator
from torchtitan.config.override import derive
from torchtitan.tools import utils
from torchtitan.trainer import Trainer

from titan_moe_lb.errors import JobError
from titan_moe_lb.parallel.batch_cut import Cut


def adapt(config: Trainer.Config, cut: Cut) -> None:
    """Make the finite loaders of a job stop on all ranks together, in place."""
    validator = config.validator
    if isinstance(validator, Validator.Config) and validator.enable and validator.steps == -1:
        pipelined = config.parallelism.pipeline_parallel_degree > 1
        validator.dataloader = _together(
            validator.dataloader,
            name="validator.dataloader",
            least=cut.local_batch_size // cut.micro_batch_size,
            whole=pipelined,
        )
    sources = getattr(config.dataloader, "sources", [config.dataloader])
    if not all(getattr(source, "infinite", True) for source in sources):
        config.dataloader = _together(config.dataloader, name="dataloader", least=1, whole=True)


def _together(config: BaseDataLoader.Config, **fields: Any) -> BaseDataLoader.Config:
    return derive(config, _stopping_together(config._owner).Config, **fields)


@functools.cache
def _stopping_together(loader: type[Any]) -> type[Any]:
    class StoppingTogether(loader):
        @dataclass(kw_only=True, slots=True)
        class Config(loader.Config):  # type: ignore[name-defined]
            name: str
            """The user's key of this loader."""
            least: int
            """Batches that a step needs."""
            whole: bool
            """Skip a last batch with fewer rows: pipelines need one size, and a loss over
            sequences divides by it."""

        def __init__(self, config: Config, *, local_batch_size: int, **kwargs: Any) -> None:
            self._end, self._rows = config, local_batch_size
            super().__init__(config, local_batch_size=local_batch_size, **kwargs)

        def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
            batches, given = super().__iter__(), 0
            batch: Any
            fewest = self._rows if self._end.whole else 1
            while _all(len((batch := next(batches, ({}, ())))[1]) >= fewest):
                yield batch
                given += 1
            if given < self._end.least:
                raise JobError(
                    f"{self._end.name} has no {self._end.least * self._rows} rows for each data-parallel "
                    "rank: take a larger dataset, or a smaller training.local_batch_size or "
                    "training.seq_len"
                )

    StoppingTogether.__qualname__ = loader.__qualname__
    return StoppingTogether


def _all(holds: bool) -> bool:
    """Return True if the condition holds on every rank. Collective."""
    everywhere = torch.tensor(int(holds), device=utils.device_type)
    if dist.is_initialized():
        dist.all_reduce(everywhere, dist.ReduceOp.MIN)
    return bool(everywhere)

"""Job that each process resolves once and passes on."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from titan_moe_lb.checkpoints.resume_point import Checkpoint, start_of
from titan_moe_lb.parallel.batch_cut import Cut
from titan_moe_lb.parallel.layout import Layout


@dataclass(frozen=True)
class Job:
    """Config, layout of the processes and start checkpoint of a job.

    Attributes:
        config: a ``Trainer.Config``.
        layout: layout of ``[parallelism]`` over the processes.
        start: checkpoint to load; None for random weights, and for weights of Hugging Face.
    """

    config: Any
    layout: Layout
    start: Checkpoint | None

    @classmethod
    def of(cls, config: Any, world_size: int) -> Job:
        """Resolve the layout and find the checkpoint.

        Raises:
            JobError: the layout does not fit ``world_size`` processes.
        """
        return cls(config, Layout.of(config.parallelism, world_size), start_of(config))

    @cached_property
    def cut(self) -> Cut:
        """Cut of the job's global batch."""
        return Cut.of(self.config, self.layout)

    def bind(self) -> None:
        """Pass this job to a balanced model, which then does not resolve its own."""
        hooks = self.config.model_spec.post_optimizer_build_fn
        if hasattr(hooks, "job"):
            hooks.job = self

    @cached_property
    def bound(self) -> Any:
        """Copy of the config with its model filled in, as torchtitan does before it builds it."""
        config = copy.deepcopy(self.config)
        Job(config, self.layout, self.start).bind()
        config.model_spec.model.update_from_config(config=config)
        return config

    @cached_property
    def meta_model(self) -> nn.Module:
        """Model of the job on the meta device, without memory."""
        with torch.device("meta"):
            return self.bound.model_spec.model.build()

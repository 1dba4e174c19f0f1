"""A job, resolved once in each process and passed on."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from titan_moe_lb.checkpoints.start import Checkpoint, start_of
from titan_moe_lb.parallel.batch_cut import Cut
from titan_moe_lb.parallel.layout import Layout


@dataclass(frozen=True)
class Job:
    """A config, the layout of its processes and the checkpoint that it starts from.

    Attributes:
        config: a ``Trainer.Config``.
        layout: of ``[parallelism]`` and the number of processes.
        start: None for random weights, and for those of Hugging Face.
    """

    config: Any
    layout: Layout
    start: Checkpoint | None

    @classmethod
    def of(cls, config: Any, world_size: int) -> Job:
        """Resolve the layout and look for the checkpoint.

        Raises:
            JobError: the layout does not fit ``world_size`` processes.
        """
        return cls(config, Layout.of(config.parallelism, world_size), start_of(config))

    @cached_property
    def cut(self) -> Cut:
        """How the job cuts its global batch."""
        return Cut.of(self.config, self.layout)

    def bind(self) -> None:
        """Let a balanced model take this job where torchtitan binds it, and not resolve its own."""
        hooks = self.config.model_spec.post_optimizer_build_fn
        if hasattr(hooks, "job"):
            hooks.job = self

    @cached_property
    def bound(self) -> Any:
        """A copy of the config whose model is filled in as torchtitan does before it builds it."""
        config = copy.deepcopy(self.config)
        Job(config, self.layout, self.start).bind()
        config.model_spec.model.update_from_config(config=config)
        return config

    @cached_property
    def meta_model(self) -> nn.Module:
        """The model of the job on the meta device, without memory."""
        with torch.device("meta"):
            return self.bound.model_spec.model.build()

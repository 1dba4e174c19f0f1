"""Correct gradients of torchtitan 0.3.0 under a zero-bubble pipeline schedule.

These schedules run the backward of a stage in two passes: for its inputs, then for its weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch._functorch.config
import torch.compiler.config
from torch import nn
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from titan_moe_lb.parallel.schedules import ZERO_BUBBLE_SCHEDULES


def adapt(config: Trainer.Config) -> None:
    """Adapt a job, in place, if its schedule may split the backward."""
    parallelism = config.parallelism
    # A schedule from a file may split its backward too; assume that it does.
    splits_backward = parallelism.pipeline_parallel_schedule in ZERO_BUBBLE_SCHEDULES or bool(
        parallelism.pipeline_parallel_schedule_csv
    )
    if parallelism.pipeline_parallel_degree == 1 or not splits_backward:
        return
    spec = config.model_spec
    assert spec is not None and spec.pipelining_fn is not None
    spec.pipelining_fn = _keeping_buffers(spec.pipelining_fn)
    _compute_loss_whole(config)


def _keeping_buffers(pipeline: Callable[..., tuple]) -> Callable[..., tuple]:
    """Wrap a ``ModelSpec.pipelining_fn`` so that the backward of compiled blocks can run twice.

    Saved activations are then kept for the rest of the process. Upstream fact: a compiled block is
    one autograd node, which both passes run. With functorch's donated buffers, the first pass may
    overwrite the activations. The compile caches ignore this setting. Without a separate tag, the job
    would load a backward that was compiled for another schedule, and train on NaN.
    """

    @functools.wraps(pipeline)
    def pipeline_keeping_buffers(model: nn.Module, **arguments: Any) -> tuple:
        torch._functorch.config.donated_buffer = False
        torch.compiler.config.cache_key_tag += "+kept_buffers"
        return pipeline(model, **arguments)

    return pipeline_keeping_buffers


def _compute_loss_whole(config: Trainer.Config) -> None:
    """Replace a chunked loss by the loss that it wraps.

    Upstream fact: ``ChunkedLossWrapper`` reshards the FSDP group of final norm and head at the end
    of the loss. The pass for the weights then searches the graph for the sharded parameter, but
    the graph has the unsharded one. So the final norm gets no gradient.
    """
    if isinstance(config.loss, ChunkedLossWrapper.Config):
        config.loss = config.loss.loss_fn
        logger.info(
            "The loss is computed whole, not in chunks: a zero-bubble schedule would leave "
            "the final norm without a gradient"
        )

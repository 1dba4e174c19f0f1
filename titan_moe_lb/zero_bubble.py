"""Compiled blocks under a zero-bubble pipeline schedule."""

from __future__ import annotations

import torch._functorch.config
from torchtitan.trainer import Trainer

from titan_moe_lb.validation import ZERO_BUBBLE_SCHEDULES


def let_backward_run_twice(config: Trainer.Config) -> None:
    """Keep the saved activations of compiled blocks where their backward runs twice.

    Upstream fact: these schedules run the backward of a stage in two passes
    (inputs, then weights). A compiled block is one autograd node, so both passes
    enter it, and functorch's donated buffers free the activations after the first.
    """
    if (
        config.parallelism.pipeline_parallel_degree > 1
        and config.parallelism.pipeline_parallel_schedule in ZERO_BUBBLE_SCHEDULES
    ):
        torch._functorch.config.donated_buffer = False

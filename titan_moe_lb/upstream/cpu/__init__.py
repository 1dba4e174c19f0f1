"""The host backend: what torchtitan 0.3.0 needs to run without an accelerator.

``adapt(config)`` changes a complete job config. ``prepare()``, where a run begins or a model is
built, patches torch and torchtitan for the rest of the process. With an accelerator neither has an
effect, and no module of this package is imported.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import TYPE_CHECKING, NoReturn

import torch

if TYPE_CHECKING:
    from torchtitan.protocols.model_spec import ModelSpec
    from torchtitan.trainer import Trainer

DENSE_ATTENTION = "titan_moe_lb.upstream.cpu.attention.dense_mask_attention"


def needed() -> bool:
    """Whether there is no accelerator that torchtitan can use; it cannot use an Apple GPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator is None or accelerator.type == "mps"


def prepare() -> None:
    """Prepare this process, where needed, before a trainer or a process group is made."""
    if needed():
        use_host()


@functools.cache
def use_host() -> None:
    """Prepare this process."""
    from titan_moe_lb.upstream.cpu.device import use_host_device

    use_host_device()

    from titan_moe_lb.upstream.cpu.all_to_all import use_gloo_all_to_all
    from titan_moe_lb.upstream.cpu.attention import use_uncompiled_block_mask
    from titan_moe_lb.upstream.cpu.random_numbers import draw_whole_tensors

    use_gloo_all_to_all()
    use_uncompiled_block_mask()
    draw_whole_tensors()


def adapt(config: Trainer.Config) -> None:
    """Adapt one job, in place: dense attention, sum reduction, no CUDA graphs."""
    config.training.disable_cuda_graphs = True
    if DENSE_ATTENTION not in config.override.imports:
        config.override.imports.append(DENSE_ATTENTION)
    assert config.model_spec is not None
    adapt_spec(config.model_spec)


def adapt_spec(spec: ModelSpec) -> None:
    """Adapt how a model is parallelized, in place: sum reduction, draws of one process."""
    from titan_moe_lb.upstream.cpu.fsdp import with_sum_reduction
    from titan_moe_lb.upstream.cpu.random_numbers import with_draws_of_one_process

    spec.parallelize_fn = with_sum_reduction(spec.parallelize_fn)
    if spec.pipelining_fn is not None:
        spec.pipelining_fn = with_draws_of_one_process(spec.pipelining_fn)


def leave() -> NoReturn:
    """End a process whose job has succeeded and whose files are closed.

    With gloo of torch 2.15 about one process in twenty aborts while the interpreter shuts down
    ("terminate called without an active exception"), and torchrun reports the job as failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)

"""Host backend: changes with which torchtitan 0.3.0 runs without an accelerator.

``prepare()`` patches torch and torchtitan for the rest of the process; call it before a run begins
or a model is built. It does nothing with an accelerator. ``adapt(config)`` changes a complete job
config; call it only if :func:`needed`. Other modules of this package are imported on demand.
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
    """Return True without an accelerator that torchtitan can use; it cannot use an Apple GPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator is None or accelerator.type == "mps"


def prepare() -> None:
    """Prepare this process, if needed, before it builds a trainer or a process group."""
    if needed():
        use_host()


@functools.cache
def use_host() -> None:
    """Patch torch and torchtitan in this process for the host."""
    from titan_moe_lb.upstream.cpu.device import use_host_device

    use_host_device()

    from titan_moe_lb.upstream.cpu.attention import use_uncompiled_block_mask
    from titan_moe_lb.upstream.cpu.gloo import use_gloo_all_to_all
    from titan_moe_lb.upstream.cpu.random_numbers import draw_whole_tensors

    use_gloo_all_to_all()
    use_uncompiled_block_mask()
    draw_whole_tensors()


def adapt(config: Trainer.Config) -> None:
    """Adapt a job, in place: dense attention, no CUDA graphs, and :func:`adapt_spec`."""
    config.training.disable_cuda_graphs = True
    if DENSE_ATTENTION not in config.override.imports:
        config.override.imports.append(DENSE_ATTENTION)
    assert config.model_spec is not None
    adapt_spec(config.model_spec)


def adapt_spec(spec: ModelSpec) -> None:
    """Adapt a model, in place: sum reduction, and the initial weights of a single process."""
    from titan_moe_lb.upstream.cpu.gloo import with_sum_reduction
    from titan_moe_lb.upstream.cpu.random_numbers import with_draws_of_one_process

    spec.parallelize_fn = with_sum_reduction(spec.parallelize_fn)
    if spec.pipelining_fn is not None:
        spec.pipelining_fn = with_draws_of_one_process(spec.pipelining_fn)


def leave(status: int = 0) -> NoReturn:
    """End a process whose job has ended and whose files are closed.

    With gloo of torch 2.15, about one process in twenty aborts while the interpreter shuts down
    ("terminate called without an active exception"). torchrun would report the job as failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

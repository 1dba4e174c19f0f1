"""The command ``titan-moe-lb check``."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import psutil
import torch
from rich.console import Console

from titan_moe_lb import rules
from titan_moe_lb.balancing.self_test.faults import faults_of
from titan_moe_lb.balancing.self_test.result import WIDTH, SelfTest
from titan_moe_lb.balancing.self_test.run import measure
from titan_moe_lb.errors import JobError
from titan_moe_lb.job import job_config
from titan_moe_lb.parallel import single_process
from titan_moe_lb.resolved_job import Job
from titan_moe_lb.run import environment
from titan_moe_lb.run.dry_run import stand_in_for_missing_assets
from titan_moe_lb.upstream import cpu

ROWS, SEQ_LEN = 4, 128
"""Largest batch of the test."""
COPIES = 3
"""Memory of the test over that of the weights: weights, gradients and activations."""


def run(arguments: list[str]) -> None:
    """Test a job, print the table, and exit with status 1 if something does not act, else 0.

    Args:
        arguments: command line of the job.

    Raises:
        JobError: the job cannot run as written, is too large, or has nothing to test.
    """
    logging.getLogger().setLevel(logging.ERROR)  # torchtitan's notes are on a run
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        found = self_test(arguments, folder)
    console = Console()
    found.show(console if console.is_terminal else Console(width=WIDTH))
    status = 0 if found.acts else 1
    if cpu.needed():
        cpu.leave(status)
    raise SystemExit(status)


def self_test(arguments: list[str], folder: str) -> SelfTest:
    """Build a job in this process, in one rank, and test it.

    Args:
        arguments: command line of the job.
        folder: folder for what torchtitan writes.

    Raises:
        JobError: as :func:`run`.
    """
    draft = job_config.draft(arguments)
    if os.environ.get("NGPU"):
        ranks = environment.positive("NGPU", 1)
    else:
        ranks = draft.table.ranks or single_process.world_size()
    config = _small(draft.resolve(ranks).config, folder)
    job = Job.of(config, 1)
    rules.validate(job)
    _refuse_large(job)
    cpu.prepare()
    if cpu.needed():
        cpu.adapt(config)
    stand_in_for_missing_assets(config)
    if not single_process.is_launched():
        single_process.announce()
    job.bind()
    trainer = config.build()
    try:
        hook = getattr(trainer.config.model_spec.post_optimizer_build_fn, "step_hook", None)
        if hook is None:
            raise JobError("the model of the job is not balanced: see titan_moe_lb.balanced()")
        step = _forward_backward(trainer)
        measured = measure(trainer.model_parts, hook, step, trainer.optimizers)
    finally:
        trainer.close()
    return SelfTest(measured, faults_of(measured))


def _small(config: Any, folder: str) -> Any:
    """Reduce a job to one rank and a small batch, without compilation and files; its model stays."""
    config.parallelism = type(config.parallelism)()
    training = config.training
    training.seq_len = min(training.seq_len, SEQ_LEN)
    training.local_batch_size = min(training.local_batch_size, ROWS)
    training.global_batch_size = -1
    training.disable_cuda_graphs = True
    config.compile.enable = config.checkpoint.enable = config.validator.enable = False
    config.debug.enable_structured_logging = False
    config.dump_folder = folder
    metrics = config.metrics
    metrics.enable_tensorboard = metrics.enable_wandb = False
    if hasattr(metrics, "track_moe_metrics"):
        metrics.track_moe_metrics = True
        metrics.write_moe_trace = metrics.router_gradients = False
        metrics.record_routing_steps = []
    return config


def _refuse_large(job: Job) -> None:
    """Raise ``JobError`` for a model that does not fit in the memory of this machine."""
    weights = sum(p.numel() * p.element_size() for p in job.meta_model.parameters())
    if cpu.needed():
        room = psutil.virtual_memory().available
    else:
        room = torch.accelerator.get_memory_info()[0]
    if COPIES * weights > room:
        raise JobError(
            f"the model has {weights / 2**30:.0f} GiB of weights, and the test needs {COPIES} times "
            f"that in {room / 2**30:.0f} GiB: test the losses and biases of the job on a smaller "
            "model, as with --config deepseek_v3_tiny"
        )


def _forward_backward(trainer: Any) -> Callable[[], None]:
    """Return the trainer's own forward and backward of one batch."""
    batch, labels = next(trainer.batch_generator(trainer.dataloader))
    inputs = {
        name: value.to(trainer.device) if torch.is_tensor(value) else value
        for name, value in batch.items()
    }
    labels = labels.to(trainer.device)
    valid = (labels >= 0).sum()  # an ignored label is negative

    def step() -> None:
        trainer.forward_backward_step(
            input_dict=dict(inputs), labels=labels, global_valid_tokens=valid
        )

    return step

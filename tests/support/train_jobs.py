"""Training of a job file on the ranks of a pool, with its log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torchtitan.models.common.param_init import skip_param_init
from torchtitan.protocols.module import Module
from torchtitan.trainer import Trainer

from titan_moe_lb.data.loaders import register
from titan_moe_lb.job import job_config
from titan_moe_lb.parallel import single_process
from titan_moe_lb.run import dry_run
from titan_moe_lb.run.train import trainer_config
from titan_moe_lb.upstream import cpu, zero_bubble


def train(
    arguments: list[str], *, seed_folder: str | None = None, first_step: int = 1
) -> list[dict[str, float]]:
    """Resolve a job as the entry point does and train it; return one dict for each logged step.

    Args:
        arguments: command line of the job.
        seed_folder: folder of the seed checkpoint to start from.
        first_step: step at which the job should start or resume.
    """
    if seed_folder is not None:
        arguments = [
            "--checkpoint.enable",
            "--checkpoint.load_only",
            f"--checkpoint.initial_load_path={seed_folder}/checkpoint/step-0",
            *arguments,
        ]
    job = job_config.load(["--debug.no-enable-structured-logging", *arguments])
    if seed_folder is not None:
        skip_initialisation(job.config)
    if "--dump_folder" not in " ".join(arguments):
        job.config.metrics.write_moe_trace = False
    return train_config(job.config, first_step=first_step)


def skip_initialisation(config: Trainer.Config) -> None:
    """Skip initialization, for a job that loads its parameters or needs only their sizes.

    DTensors are slow at it.
    """
    assert config.model_spec is not None
    for _fqn, module, _parent, _name in config.model_spec.traverse(Module.Config, recurse=True):
        if module.param_init is not None:
            module.param_init = dict.fromkeys(module.param_init, skip_param_init)


def train_config(
    config: Trainer.Config,
    *,
    first_step: int = 1,
    prepare: Callable[[Trainer], None] = lambda trainer: None,
) -> list[dict[str, float]]:
    """Train a resolved config; return the same as :func:`train`.

    Args:
        first_step: as in :func:`train`.
        prepare: function that is called with the trainer before its first step.
    """
    trainer = build(config)
    prepare(trainer)
    logged: list[dict[str, float]] = []
    trainer.metrics_processor.logger = _Capture(logged, first_step)
    trainer.train()
    trainer.close()
    return logged


def build(config: Trainer.Config) -> Trainer:
    """Build the trainer of a resolved config on this machine."""
    if cpu.needed():
        cpu.adapt(config)
    zero_bubble.adapt(config)
    return config.build()


def train_to_the_end(arguments: list[str], texts: list[str]) -> list[dict[str, float]]:
    """Train as a rank of a run does; return the same as :func:`train`.

    Args:
        texts: texts of the dataset "uneven"; rank 0 of two has the first half.
    """
    register("uneven", lambda: texts)
    trainer = trainer_config("--debug.no-enable-structured-logging", *arguments).build()
    logged: list[dict[str, float]] = []
    trainer.metrics_processor.logger = _Capture(logged, 1)
    trainer.train()
    trainer.close()
    return logged


def next_inputs(arguments: list[str]) -> torch.Tensor:
    """Return the first row of a job, at the position of its checkpoint in the data."""
    trainer = trainer_config("--debug.no-enable-structured-logging", *arguments).build()
    trainer.checkpointer.load(step=-1)
    found = next(iter(trainer.dataloader))[0]["input"][0]
    trainer.close()
    return found


def load_checked(arguments: list[str]) -> int:
    """Load the checkpoint of a job with the checks of a run; return its step."""
    config = trainer_config("--debug.no-enable-structured-logging", *arguments)
    trainer = config.build()
    trainer.checkpointer.load(step=config.checkpoint.load_step)
    step = trainer.step
    trainer.close()
    return step


def build_one_rank(path: str, num_ranks: int) -> int:
    """Build rank 0 of a job without the others; return its parameters. One rank."""
    job = job_config.load(["--job-config", path, "--comm.mode=fake_backend"], num_ranks)
    job.bind()
    single_process.announce(world_size=num_ranks)
    if cpu.needed():
        cpu.adapt(job.config)
    zero_bubble.adapt(job.config)
    return dry_run.run(job.config)


def save_seed(arguments: list[str], folder: str) -> None:
    """Write the initial weights of a job to ``folder``. One rank."""
    flags = ["--checkpoint.enable", "--checkpoint.create_seed_checkpoint", "--debug.seed=0"]
    job = job_config.load([*arguments, *flags, f"--dump_folder={folder}"])
    trainer = build(job.config)
    trainer.checkpointer.save(curr_step=0, last_step=True)
    trainer.close()


class _Capture:
    """Metrics sink; see ``torchtitan.components.metrics.BaseLogger``."""

    def __init__(self, logged: list[dict[str, float]], first_step: int) -> None:
        self._logged = logged
        self._first_step = first_step

    def log(self, metrics: dict[str, Any], step: int) -> None:
        if any(name.startswith("validation_metrics/") for name in metrics):
            self._logged[-1].update(metrics)
            return
        assert step == self._first_step + len(self._logged)
        self._logged.append(dict(metrics))

    def close(self) -> None:
        pass

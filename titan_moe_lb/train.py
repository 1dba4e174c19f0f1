"""One process of a job: ``python -m titan_moe_lb.train``, under torchrun or alone.

``titan_moe_lb.launch`` starts it with the right number of processes.
"""

from __future__ import annotations

import sys
from typing import NoReturn

from titan_moe_lb.upstream import cpu

if cpu.needed():
    cpu.use_host()

from torchtitan import train as torchtitan_train
from torchtitan.trainer import Trainer

from titan_moe_lb.errors import JobError
from titan_moe_lb.job import dry_run, job_config
from titan_moe_lb.parallel import processes
from titan_moe_lb.upstream import zero_bubble


def main(arguments: list[str] | None = None) -> None:
    """Resolve the job and hand it to torchtitan's own ``main``."""
    try:
        job = job_config.load(sys.argv[1:] if arguments is None else arguments)
    except JobError as error:
        exit_with(error)
    run(job)


def trainer_config(*arguments: str) -> Trainer.Config:
    """A job for torchtitan's own Trainer: ``trainer_config(...).build().train()``.

    Args:
        arguments: the command line of a job, as for ``run_train.sh``.

    Raises:
        JobError: the job does not hold.
    """
    processes.alone()
    config = job_config.load(list(arguments)).config
    _adapt(config)
    return config


def _adapt(config: Trainer.Config) -> None:
    """To this machine, and to what torchtitan 0.3.0 needs of us."""
    if cpu.needed():
        cpu.adapt(config)
    zero_bubble.adapt(config)


def run(job: job_config.Job) -> None:
    """Train a resolved job in this process."""
    _adapt(job.config)
    if job.config.comm.mode == "fake_backend":
        dry_run.run(job.config)
        return
    # torchtitan's main reads a config function by module path and name from the
    # command line. The job is resolved, so it is the function's whole result.
    job_config.set_resolved(job)
    sys.argv[1:] = ["--module", job_config.__name__, "--config", "resolved_config"]
    torchtitan_train.main()


def exit_with(error: JobError) -> NoReturn:
    """Print the one line of a user's mistake and leave with status 2."""
    print(f"titan_moe_lb: error: {error}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
    if cpu.needed():
        cpu.leave()

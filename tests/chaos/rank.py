"""One rank of the job, and the moment in it at which a signal arrives."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import asdict, dataclass

import torch
from torchtitan.config.override import derive

from tests.support import rank_pool
from titan_moe_lb.checkpoints.loading import CheckedCheckpoints
from titan_moe_lb.job import job_config
from titan_moe_lb.run import train
from titan_moe_lb.telemetry.metrics_processor import LoadBalanceMetricsProcessor
from titan_moe_lb.upstream import cpu

MOMENTS = ("start", "step", "logged", "save", "saved")
"""While the job is built or loads; in a step, most of which is collectives; between the trace
and the checkpoint of a step; while a checkpoint is written; after it was."""
_PLAN = "TITAN_MOE_LB_CHAOS"


@dataclass(frozen=True)
class Blow:
    """A signal that some ranks get at a moment."""

    signal: int
    ranks: tuple[int, ...]
    moment: str
    step: int
    delay: float = 0.0
    """Seconds after the moment has begun."""

    def environment(self) -> dict[str, str]:
        return {_PLAN: json.dumps(asdict(self))}


def run(environment: dict[str, str], arguments: list[str], console: str) -> None:
    """A process of its own, as torchrun would start it; never returns where the job fails."""
    file = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.pop(_PLAN, None)
    os.environ.update(environment)
    torch.set_num_threads(1)
    time.sleep = rank_pool._sleep_unless_the_trainer_asks
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _strike("start", 0)
    job = job_config.load(arguments)
    job.config.metrics = derive(job.config.metrics, _Metrics.Config)
    job.config.checkpoint = derive(job.config.checkpoint, _Checkpoints.Config)
    train.run(job)
    cpu.leave()


def _strike(moment: str, step: int) -> None:
    """Get the signal if this is the moment; a delay goes on beside the work."""
    if _PLAN not in os.environ:
        return
    table = json.loads(os.environ[_PLAN])
    blow = Blow(**{**table, "ranks": tuple(table["ranks"])})
    if (blow.moment, blow.step) != (moment, step) or int(os.environ["RANK"]) not in blow.ranks:
        return
    del os.environ[_PLAN]
    if blow.delay:
        strike = threading.Timer(blow.delay, os.kill, (os.getpid(), blow.signal))
        strike.daemon = True
        strike.start()
    else:
        os.kill(os.getpid(), blow.signal)


class _Metrics(LoadBalanceMetricsProcessor):
    @dataclass(kw_only=True, slots=True)
    class Config(LoadBalanceMetricsProcessor.Config):
        pass

    def log(self, step: int, *numbers, **more) -> None:
        super().log(step, *numbers, **more)
        _strike("logged", step)


class _Checkpoints(CheckedCheckpoints):
    @dataclass(kw_only=True, slots=True)
    class Config(CheckedCheckpoints.Config):
        pass

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        if self._should_save(curr_step, last_step):
            _strike("save", curr_step)
        saved = super()._save(curr_step, last_step)
        if saved:
            _strike("saved", curr_step)
        _strike("step", curr_step + 1)
        return saved

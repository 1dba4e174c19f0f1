"""Config function of the faulty job, and the moment at which a signal reaches a rank."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from dataclasses import asdict, dataclass

from torchtitan.trainer import Trainer

from model_registry.deepseek_v3.config_registry import deepseek_v3_tiny
from titan_moe_lb.checkpoints.loading import CheckedCheckpoints
from titan_moe_lb.telemetry.metrics_processor import LoadBalanceMetricsProcessor

_VARIABLE = "TITAN_MOE_LB_FAULT"


@dataclass(frozen=True)
class FaultSignal:
    """Signal to some ranks at a moment of a step.

    The moments are ``start`` (the job is built or loads), ``step`` (mostly collectives), ``logged``
    (between the trace and the checkpoint of a step), ``save`` (a checkpoint is written), and
    ``saved`` (after it was written).
    """

    signal: int
    ranks: tuple[int, ...]
    moment: str
    step: int
    delay: float = 0.0
    """Seconds after the start of the moment."""

    def environment(self) -> dict[str, str]:
        """Environment variables of the job."""
        return {_VARIABLE: json.dumps(asdict(self))}


def tiny() -> Trainer.Config:
    """Configure the tiny flavor; in a rank, prepare the signal."""
    if "RANK" in os.environ and _VARIABLE in os.environ:
        _prepare(FaultSignal(**json.loads(os.environ.pop(_VARIABLE))))
    return deepseek_v3_tiny()


def _prepare(fault: FaultSignal) -> None:
    """Wrap the methods that begin the moments, for the rest of this process."""
    if int(os.environ["RANK"]) not in fault.ranks:
        return
    log, save = LoadBalanceMetricsProcessor.log, CheckedCheckpoints._save

    def reached(moment: str, step: int) -> None:
        if (fault.moment, fault.step) != (moment, step):
            return
        if fault.delay:
            timer = threading.Timer(fault.delay, _send, (fault.signal,))
            timer.daemon = True
            timer.start()
        else:
            _send(fault.signal)

    def logged(self: LoadBalanceMetricsProcessor, step: int, *numbers, **more) -> None:
        log(self, step, *numbers, **more)
        reached("logged", step)

    def saved(self: CheckedCheckpoints, curr_step: int, last_step: bool = False) -> bool:
        if self._should_save(curr_step, last_step):
            reached("save", curr_step)
        is_saved = save(self, curr_step, last_step)
        if is_saved:
            reached("saved", curr_step)
        reached("step", curr_step + 1)
        return is_saved

    LoadBalanceMetricsProcessor.log = logged  # type: ignore[method-assign]
    CheckedCheckpoints._save = saved  # type: ignore[method-assign]
    reached("start", 0)


def _send(number: int) -> None:
    """Signal this process. A stopped process continues after a second."""
    if number == signal.SIGSTOP:
        subprocess.Popen(["sh", "-c", f"sleep 1; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), number)

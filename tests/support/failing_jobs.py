"""Tiny job that fails as FAILURE names when its second step is logged."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint import CheckpointException
from torchtitan.config.override import derive

from model_registry.deepseek_v3 import config_registry
from titan_moe_lb.telemetry.metrics_processor import LoadBalanceMetricsProcessor

FAILURES = {
    "bug": lambda: RuntimeError("a bug\nof two lines"),
    "disk": lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "outputs/x"),
    "memory": lambda: torch.OutOfMemoryError("Tried to allocate 20.00 GiB."),
    "checkpoint": lambda: CheckpointException("save", {0: (ValueError("cut"), None)}),  # type: ignore[dict-item]
}


class Failing(LoadBalanceMetricsProcessor):
    @dataclass(kw_only=True, slots=True)
    class Config(LoadBalanceMetricsProcessor.Config):
        pass

    def log(self, step: int, *numbers, **more) -> None:
        super().log(step, *numbers, **more)
        if step == 2 and "FAILURE" in os.environ:
            raise FAILURES[os.environ["FAILURE"]]()


def tiny():
    config = config_registry.deepseek_v3_tiny()
    config.metrics = derive(config.metrics, Failing.Config)
    return config

"""Training with torchtitan's own sinks, which records their calls in order."""

from __future__ import annotations

import os
from typing import Any

import wandb

from tests.support.train_jobs import build
from titan_moe_lb.job import job_config


def train_into_sinks(arguments: list[str]) -> list[tuple[int, dict[str, Any]]]:
    """Train; return (step, metrics) of every call of this rank's sink, validation included."""
    os.environ["WANDB_MODE"] = "offline"
    config = job_config.load(["--debug.no-enable-structured-logging", *arguments]).config
    trainer = build(config)
    sink = trainer.metrics_processor.logger
    write, logged = sink.log, []

    def note(metrics: dict[str, Any], step: int) -> None:
        logged.append((step, dict(metrics)))
        write(metrics, step)

    sink.log = note
    trainer.train()
    trainer.close()
    # W&B's own process ends an offline run's file some milliseconds after finish() has returned.
    wandb.teardown()
    return logged

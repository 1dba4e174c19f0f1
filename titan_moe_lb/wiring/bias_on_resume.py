"""Resumption from a checkpoint with another bias rule, or with ``reset = true``."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from titan_moe_lb.balancing.expert_bias.base import ExpertBias
from titan_moe_lb.balancing.router import moe_layers_of
from titan_moe_lb.checkpoints.resume_point import is_remote, own_folder, remedy
from titan_moe_lb.errors import JobError
from titan_moe_lb.resolved_job import Job

MARKER = "expert_bias_reset.json"
"""File in the run's checkpoint folder: the step from whose checkpoint the bias was reset."""


@dataclass(frozen=True, kw_only=True)
class BiasReset:
    """Reset of the biases of a rank to zero when its model is loaded."""

    marker: Path
    """File that records the reset."""
    step: int
    """Step of the loaded checkpoint; 0 for weights from elsewhere."""

    @classmethod
    def of(cls, job: Job, rules: Sequence[ExpertBias.Config]) -> BiasReset | None:
        """Return the reset of a job, or None if no reset is due.

        None is due after a restart from a later checkpoint of the job itself.
        """
        if not any(rule.reset for rule in rules) or not job.config.checkpoint.enable:
            return None
        if is_remote(job.config):
            raise JobError(
                "expert_bias reset = true is noted beside the run's checkpoints, which has to be "
                "a local folder: set dump_folder, checkpoint.folder and initial_load_path to one"
            )
        step = (job.start.step if job.start else None) or 0
        marker = own_folder(job.config) / MARKER
        if marker.is_file():
            before = json.loads(marker.read_text())["step"]
            if step > before:
                logging.getLogger().info(
                    f"The expert bias was reset after step {before} and goes on as it was learned "
                    f"since (delete {marker} to reset it again)"
                )
                return None
        return cls(marker=marker, step=step)

    def register(self, model_parts: list[nn.Module]) -> None:
        """Register the reset for the load of the checkpoint.

        torchtitan loads a checkpoint after ``post_optimizer_build_fn``.
        """
        for part in model_parts:
            part.register_load_state_dict_post_hook(self._zero)

    def _zero(self, part: nn.Module, _keys: object) -> None:
        with torch.no_grad():
            for layer in moe_layers_of([part]):
                if layer.expert_bias_E is not None:
                    layer.expert_bias_E.zero_()
        if dist.get_rank() == 0:
            logging.getLogger().info(
                "The expert bias of the checkpoint was set to zero (reset = true)"
            )
            self.marker.parent.mkdir(parents=True, exist_ok=True)
            self.marker.write_text(json.dumps({"step": self.step}) + "\n")


def start_anew(job: Job, rules: dict[str, ExpertBias.Config]) -> None:
    """Let rules start without state if another rule wrote the checkpoint.

    torchtitan loads all state of a model and fails if the checkpoint lacks a part. The rules'
    buffers are therefore not part of the state until the model is loaded.
    """
    start = job.start
    if start is None or not any(rule._owner.state_names for rule in rules.values()):
        return
    try:
        saved = start.metadata.state_dict_metadata
    except JobError as error:
        raise JobError(f"{error}; {remedy(own_folder(job.config), start.path)}") from None
    for fqn, rule in rules.items():
        names = [f"{fqn}.expert_bias.{name}" for name in rule._owner.state_names]
        rule.starts_anew = any(name not in saved for name in names)


def remember_once_loaded(model_parts: list[nn.Module]) -> None:
    """Add the state that :func:`start_anew` left out to the checkpoints of this job."""

    def remember(part: nn.Module, _keys: object) -> None:
        for rule in part.modules():
            if isinstance(rule, ExpertBias) and rule.config.starts_anew:
                for name in rule.state_names:
                    rule.register_buffer(name, getattr(rule, name), persistent=True)

    for part in model_parts:
        part.register_load_state_dict_post_hook(remember)

"""Config function whose import makes a process record calls that a start should make once."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from model_registry.deepseek_v3.config_registry import deepseek_v3_tiny
from titan_moe_lb import resolved_job, rules

FILE = "TITAN_MOE_LB_COUNTS"
"""Variable with the path of the record: one line for each call, with process and name."""


def _noted(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with open(os.environ[FILE], "a") as file:
            file.write(f"{os.getpid()} {name}\n")
        return function(*args, **kwargs)

    return call


if FILE in os.environ:
    rules.validate = _noted(rules.validate, "validation")
    resolved_job.start_of = _noted(resolved_job.start_of, "look for the checkpoint")
    resolved_job.Job.meta_model.func = _noted(resolved_job.Job.meta_model.func, "meta model")


def tiny():
    return deepseek_v3_tiny()

"""Tests of the examples: each trains on one process and on two, and all ranks agree."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

LOOPS = ("plain_loop", "fine_tuning", "dpo", "grpo")
CHOICES = {"dpo": (6 * 64 * 2,) * 2, "grpo": (32 * (4 + 4) * 2, 32 * (4 + 8) * 2)}
"""Least and most that a step counts in a layer; each token has 2 experts. DPO has 6 rows of 64
tokens. GRPO has 32 rows, cut by length, in one epoch. Reference and rollout forwards do not count."""


def run_example(name: str, steps: int) -> tuple[list[dict[str, float]], int]:
    """Run an example; return its history, and the counted choices of the last step in a layer.
    Every rank."""
    example = importlib.import_module(f"examples.{name}")
    balances = []
    attach = example.attach

    def attach_and_keep(*args: Any, **kwargs: Any):
        balances.append(attach(*args, **kwargs))
        return balances[-1]

    example.attach = attach_and_keep
    try:
        history = example.main(steps)
    finally:
        example.attach = attach
    return history, int(balances[0].load().counts_ME[0].sum())


@pytest.mark.parametrize("name", LOOPS)
def test_loop_learns(ranks, name):
    ((history, counted),) = ranks.run(1, run_example, name, 8)
    better = [step["reward"] if name == "grpo" else -step["loss"] for step in history]
    assert np.mean(better[-3:]) > np.mean(better[:3])
    assert all(np.isfinite(list(step.values())).all() for step in history)
    if name in CHOICES:
        least, most = CHOICES[name]
        assert least <= counted <= most


@pytest.mark.parametrize("name", LOOPS)
def test_two_ranks_tell_the_same(ranks, name):
    (first, counted), (second, same) = ranks.run(2, run_example, name, 2)
    assert first == second and counted == same
    assert first[-1]["moe/avg_overload_factor"] == 1  # no expert parallelism


def train_by_script(steps: int) -> None:
    importlib.import_module("examples.trainer").main(steps)
    assert not dist.is_initialized() or dist.get_world_size() == 1


def test_trainer_in_a_script(ranks, tmp_path, monkeypatch):
    ranks.run(1, train_by_script, 1)

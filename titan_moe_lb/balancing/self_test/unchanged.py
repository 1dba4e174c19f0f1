"""Restoration of everything that a self-test touches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from titan_moe_lb.balancing.step_hook import StepHook


@contextmanager
def unchanged(parts: list[nn.Module], hook: StepHook) -> Iterator[None]:
    """Restore gradients, buffers, the record and the step of a rank at the end, bit for bit.

    Parameters are not copied: a self-test steps optimizers without gradients only.
    """
    gradients = [(p, p.grad) for part in parts for p in part.parameters()]
    buffers = [(b, b.detach().clone()) for part in parts for b in part.buffers()]
    things = [hook, hook.tokens, hook.record, hook.record.scores]
    states = [_State(thing) for thing in things if thing is not None]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, gradient in gradients:
                parameter.grad = gradient
            for buffer, before in buffers:
                buffer.copy_(before)
            for state in states:
                state.restore()


class _State:
    """Attributes of an object: its tensors by value, its lists by element, others as they are."""

    def __init__(self, thing: Any) -> None:
        self._thing = thing
        self._attributes: dict[str, Any] = {
            name: [*value] if isinstance(value, list) else value
            for name, value in vars(thing).items()
        }
        self._tensors = {
            name: value.detach().clone()
            for name, value in self._attributes.items()
            if isinstance(value, torch.Tensor)
        }

    def restore(self) -> None:
        vars(self._thing).update(self._attributes)
        for name, before in self._tensors.items():
            self._attributes[name].detach().copy_(before)


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Restore the generators of the host and the current device at the end."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type == "mps":
        with torch.random.fork_rng([]):
            yield
        return
    devices = [torch.accelerator.current_device_index()]
    with torch.random.fork_rng(devices, device_type=accelerator.type):
        yield

"""What one router records during a step, on its device and without host synchronisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torchtitan.protocols.module import Module


def _is_recomputation() -> bool:
    """True in a forward that eager activation checkpointing runs again in backward.

    Non-reentrant checkpointing recomputes from inside the autograd engine, where a
    graph task is current (torch.utils.checkpoint relies on the same fact). A
    compiled block needs no test: its forward graph alone holds the mutations of
    buffers.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class LoadRecorder(Module):
    """Counts of the running step and a snapshot of the last whole step.

    Each forward of a training step is recorded exactly once, recomputation by
    activation checkpointing not counted. Buffers are local to the rank and are
    summed over ranks by :mod:`titan_moe_lb.telemetry.reduction`.

    Attributes:
        counts_E: tokens per expert of the running step, int64 ``(E,)``.
        losses_A: raw values of the router's A losses, float32 ``(A,)``, as this
            rank's share of the mean over the global batch.
        step_counts_E, step_losses_A: the same of the last finished step.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        num_experts: int
        num_losses: int

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.num_losses = config.num_losses
        self._register(device=None)

    def _register(self, device: torch.device | None) -> None:
        for name in ("counts_E", "step_counts_E"):
            zeros = torch.zeros(self.num_experts, dtype=torch.int64, device=device)
            self.register_buffer(name, zeros, persistent=False)
        for name in ("losses_A", "step_losses_A"):
            zeros = torch.zeros(self.num_losses, dtype=torch.float32, device=device)
            self.register_buffer(name, zeros, persistent=False)

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        self._register(buffer_device or self.counts_E.device)

    def record(self, counts_E: torch.Tensor, losses_A: torch.Tensor | None) -> None:
        """Add one forward: tokens per expert ``(E,)`` and loss values ``(A,)`` or None."""
        if not self.training or _is_recomputation():
            return
        with torch.no_grad():
            self.counts_E.add_(counts_E.to(torch.int64))
            if losses_A is not None:
                self.losses_A.add_(losses_A)


def finish_step(recorders: list[LoadRecorder]) -> None:
    """Move the running step of every recorder to its snapshot and start anew."""
    if not recorders:
        return
    for running, finished in (("counts_E", "step_counts_E"), ("losses_A", "step_losses_A")):
        source = [getattr(recorder, running) for recorder in recorders]
        torch._foreach_copy_([getattr(recorder, finished) for recorder in recorders], source)
        torch._foreach_zero_(source)

"""What one router records during a step, on its device and without host synchronisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torchtitan.protocols.module import Module

from titan_moe_lb.recomputation import is_recomputation


class LoadRecorder(Module):
    """Counts of the running step and a snapshot of the last whole step.

    Each forward of a training step is recorded exactly once, recomputation by
    activation checkpointing not counted. Buffers are local to the rank and are
    summed over ranks by :mod:`titan_moe_lb.telemetry.reduction`.

    Attributes:
        counts_SE: tokens per expert of the running step, int64 ``(S, E)``: one row for
            each source that the router's losses count from, selected experts first.
        losses_A: raw values of the router's A losses, float32 ``(A,)``, as this
            rank's share of the mean over the global batch.
        step_counts_SE, step_losses_A: the same of the last finished step.
        reduced: the snapshot holds the sums over the ranks already.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        num_experts: int
        num_sources: int
        num_losses: int

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._shapes = {
            "counts_SE": ((config.num_sources, config.num_experts), torch.int64),
            "losses_A": ((config.num_losses,), torch.float32),
        }
        self.reduced = False
        self._register(device=None)

    def _register(self, device: torch.device | None) -> None:
        for name, (shape, dtype) in self._shapes.items():
            for buffer in (name, f"step_{name}"):
                zeros = torch.zeros(shape, dtype=dtype, device=device)
                self.register_buffer(buffer, zeros, persistent=False)

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        self._register(buffer_device or self.counts_SE.device)

    def record(self, counts_SE: torch.Tensor, losses_A: torch.Tensor | None) -> None:
        """Add one forward: tokens per expert ``(S, E)`` and loss values ``(A,)`` or None."""
        if not self.training or is_recomputation():
            return
        with torch.no_grad():
            self.counts_SE.add_(counts_SE.to(torch.int64))
            if losses_A is not None:
                self.losses_A.add_(losses_A)


def finish_step(recorders: list[LoadRecorder]) -> None:
    """Move the running step of every recorder to its snapshot and start anew."""
    if not recorders:
        return
    for name in ("counts_SE", "losses_A"):
        running = [getattr(recorder, name) for recorder in recorders]
        torch._foreach_copy_([getattr(r, f"step_{name}") for r in recorders], running)
        torch._foreach_zero_(running)
    for recorder in recorders:
        recorder.reduced = False

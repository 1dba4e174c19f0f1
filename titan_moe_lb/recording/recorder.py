"""What one router records during a step, on its device and without host synchronisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torchtitan.protocols.module import Module

from titan_moe_lb.recording.recomputation import is_recomputation


class LoadRecorder(Module):
    """Counts of the running step and a snapshot of the last whole step.

    Each forward of a training step is recorded exactly once, recomputation by
    activation checkpointing not counted. Buffers are local to the rank and are
    summed over ranks by :mod:`titan_moe_lb.telemetry.reduction`.

    Attributes:
        counts_MSE: tokens per expert of the running step, int64 ``(M, S, E)``: for each
            micro-batch one row for each source that the router's losses count from,
            selected experts first.
        losses_A: raw values of the router's A losses, float32 ``(A,)``, as this
            rank's share of the mean over the global batch.
        expert_ids_MBLK: experts of each token of the running step, the smallest unsigned
            type up to uint8, else int32; None unless ``token_shape``.
        step_counts_MSE, step_losses_A: the same of the last finished step.
        global_counts_SE, global_losses_A: the last finished step over all its micro-batches
            and ranks, int64 and float64; valid where ``reduced``.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        num_experts: int
        num_micro_batches: int
        num_sources: int
        num_losses: int
        token_shape: tuple[int, int, int] | None = None
        """(B, L, K) of a micro-batch on a rank, to keep the experts of each token."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._shapes = {
            "counts_MSE": (
                (config.num_micro_batches, config.num_sources, config.num_experts),
                torch.int64,
            ),
            "losses_A": ((config.num_losses,), torch.float32),
        }
        self._results = {
            "global_counts_SE": ((config.num_sources, config.num_experts), torch.int64),
            "global_losses_A": ((config.num_losses,), torch.float64),
        }
        self._ids_shape = (
            (config.num_micro_batches, *config.token_shape) if config.token_shape else None
        )
        self._ids_dtype = torch.uint8 if config.num_experts <= 256 else torch.int32
        self.num_micro_batches = config.num_micro_batches
        self.reduced = False
        self._register(device=None)

    def _register(self, device: torch.device | None) -> None:
        def zeros(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
            buffer = torch.zeros(shape, dtype=dtype, device=device)
            self.register_buffer(name, buffer, persistent=False)

        for name, (shape, dtype) in self._shapes.items():
            zeros(name, shape, dtype)
            zeros(f"step_{name}", shape, dtype)
        for name, (shape, dtype) in self._results.items():
            zeros(name, shape, dtype)
        if self._ids_shape is not None:
            zeros("expert_ids_MBLK", self._ids_shape, self._ids_dtype)
        else:
            self.expert_ids_MBLK = None

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        self._register(buffer_device or self.counts_MSE.device)

    def record(
        self,
        slot: torch.Tensor,
        counts_SE: torch.Tensor,
        losses_A: torch.Tensor | None,
        expert_ids_BLK: torch.Tensor,
    ) -> None:
        """Add one forward.

        Args:
            slot: place of the micro-batch, int64 ``(1,)``.
            counts_SE: tokens per expert ``(S, E)``.
            losses_A: loss values ``(A,)``, or None.
            expert_ids_BLK: selected experts.
        """
        if not self.training or is_recomputation():
            return
        with torch.no_grad():
            self.counts_MSE.index_add_(0, slot, counts_SE.to(torch.int64).unsqueeze(0))
            if losses_A is not None:
                self.losses_A.add_(losses_A)
            if self.expert_ids_MBLK is not None:
                ids = expert_ids_BLK.to(self._ids_dtype).unsqueeze(0)
                self.expert_ids_MBLK.index_copy_(0, slot, ids)


def finish_step(recorders: list[LoadRecorder]) -> None:
    """Move the running step of every recorder to its snapshot and start anew."""
    if not recorders:
        return
    for name in ("counts_MSE", "losses_A"):
        running = [getattr(recorder, name) for recorder in recorders]
        torch._foreach_copy_([getattr(r, f"step_{name}") for r in recorders], running)
        torch._foreach_zero_(running)
    for recorder in recorders:
        recorder.reduced = False

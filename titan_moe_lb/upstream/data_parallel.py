"""Exclusion of buffers from torch's DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def ignore_buffers(model: nn.Module, names: Iterable[str]) -> None:
    """Keep DistributedDataParallel from copying buffers of rank 0 to all ranks at every forward.

    Args:
        model: the model, not yet wrapped.
        names: names of buffers in ``model``; they are added to those that are already ignored.
    """
    ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", [])
    model._ddp_params_and_buffers_to_ignore = [*ignored, *names]  # type: ignore[assignment]

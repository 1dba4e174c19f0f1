"""Buffers that torch's DistributedDataParallel leaves alone."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def ignore_buffers(model: nn.Module, names: Iterable[str]) -> None:
    """Keep DistributedDataParallel from copying buffers of rank 0 to all ranks at every forward.

    Args:
        names: of the buffers in ``model``; added to those that are ignored already.
    """
    ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", [])
    model._ddp_params_and_buffers_to_ignore = [*ignored, *names]  # type: ignore[assignment]

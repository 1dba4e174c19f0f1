"""The pipeline schedules that a job can name."""

from __future__ import annotations

ZERO_BUBBLE_SCHEDULES = ("ZBVZeroBubble", "InterleavedZeroBubble", "DualPipeV")
"""Schedules that run the backward of a stage in two passes."""

SCHEDULES = ("1F1B", "GPipe", "Interleaved1F1B", "LoopedBFS", *ZERO_BUBBLE_SCHEDULES)
"""Schedules of torch.distributed.pipelining that can be named in a job."""

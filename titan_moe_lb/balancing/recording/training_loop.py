"""What a training loop says of its optimizer steps before the first of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingLoop:
    """Filled from a job's config, or by :func:`titan_moe_lb.attach`."""

    track: bool = True
    """Keep what the metrics show: the counts of each micro-batch."""

    gradients: bool = False
    """Measure how strong the model's loss and the aux losses pull at each router."""

    num_micro_batches: int = 1
    """Forwards of a router in an optimizer step; in a loop of one's own, at most."""

    varying: bool = False
    """Steps differ in the number of their micro-batches."""

    micro_batch_size: int | None = None
    """Rows of every forward; None where they differ."""

    global_batch_size: int | None = None
    """Rows of every optimizer step, over all ranks; None where each step says its own."""

    tokens_per_step: int | None = None
    """Tokens of a global batch; None where they differ."""

    padded: bool = False
    """Batches say which of their tokens are valid."""

    recorded_tokens: tuple[int, int] | None = None
    """(B, L) of a micro-batch on a rank, to keep the experts of each token."""

    context_parallel_load_balancer: str | None = None
    """How context parallelism deals the tokens of a row to its ranks."""

    gradient_divisor: int = 1
    """What the loop divides the sum of the gradients of its ranks by."""

    finished_steps: int = 0
    """Optimizer steps of the checkpoint that the loop goes on from."""

    seen_tokens: int = 0
    """Tokens of those steps, over all ranks."""

"""Properties of a training loop's optimizer steps, known before the first step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingLoop:
    """Properties of the steps, filled from a job's config or by :func:`titan_moe_lb.attach`."""

    track: bool = True
    """Record the counts of each micro-batch, for the metrics."""

    gradients_every: int = 0
    """Steps from one measurement of the gradients at each router to the next; 0 for none. The first
    step is measured too."""

    scores_every: int = 0
    """Steps from one record of the sums of the scores to the next; 0 for none. The first step is
    recorded too."""

    num_micro_batches: int = 1
    """Forwards of a router in an optimizer step; the maximum if ``varying``."""

    varying: bool = False
    """True if steps differ in the number of their micro-batches."""

    accumulation_steps: int = 1
    """Local batches of a data-parallel rank in an optimizer step."""

    announced_rows: int | None = None
    """Rows of every optimizer step over all ranks, in a loop that announces them once. In a job
    they follow from ``local_batch_size`` of the losses."""

    tokens_per_step: int | None = None
    """Tokens of a global batch; None if steps differ."""

    padded: bool = False
    """True if batches have a mask of valid tokens."""

    recorded_tokens: tuple[int, int] | None = None
    """(B, L) of a micro-batch on a rank, to record the experts of each token."""

    context_parallel_load_balancer: str | None = None
    """Assignment of the tokens of a row to context-parallel ranks."""

    gradient_divisor: int = 1
    """Divisor that the loop applies to the sum of its ranks' gradients."""

    finished_steps: int = 0
    """Optimizer steps of the checkpoint that the loop resumes from."""

    seen_tokens: int = 0
    """Tokens of those steps, over all ranks."""

    def measures_gradients(self, step: int) -> bool:
        """Return True if the gradients at each router are measured in a step, numbered from 1."""
        return _is_sampled(step, self.gradients_every)

    def records_scores(self, step: int) -> bool:
        """Return True if a step, numbered from 1, records the sums of the scores."""
        return _is_sampled(step, self.scores_every)


def _is_sampled(step: int, every: int) -> bool:
    return every > 0 and (step == 1 or step % every == 0)

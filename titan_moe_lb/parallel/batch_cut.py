"""Cut of a job's global batch, and the part that each rank holds.

The sequences of a global batch are numbered by accumulation step, then by
data-parallel rank, then by micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from titan_moe_lb.parallel.layout import Layout
from titan_moe_lb.parallel.rank_groups import RankGroups


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Numbers of the cut of a global batch."""

    global_batch_size: int
    """Sequences of one optimizer step, resolved: never -1."""
    local_batch_size: int
    """Sequences of one data-parallel rank in one accumulation step."""
    micro_batch_size: int
    """Sequences of one forward: local_batch_size without pipeline parallelism."""
    accumulation_steps: int
    seq_len: int
    """Tokens of a whole sequence."""
    sequence_shards: int
    """Ranks that share one sequence of a router: CP, and TP with EP."""
    context_parallel_load_balancer: str | None

    @classmethod
    def of(cls, config: Any, layout: Layout) -> Cut:
        """Read the batch settings of a ``Trainer.Config``."""
        training, parallelism = config.training, config.parallelism
        local = training.local_batch_size
        per_pass = local * layout.data_ranks
        total = per_pass if training.global_batch_size < 0 else training.global_batch_size
        pipelined = layout.pp > 1
        return cls(
            global_batch_size=total,
            local_batch_size=local,
            micro_batch_size=parallelism.pipeline_parallel_microbatch_size if pipelined else local,
            accumulation_steps=total // per_pass,
            seq_len=training.seq_len,
            sequence_shards=layout.sequence_shards,
            context_parallel_load_balancer=parallelism.context_parallel_load_balancer,
        )

    @property
    def num_micro_batches(self) -> int:
        """Forwards of one router in an optimizer step."""
        return self.accumulation_steps * (self.local_batch_size // self.micro_batch_size)

    @property
    def local_sequence_length(self) -> int:
        """Tokens of one sequence that one router sees."""
        return self.seq_len // self.sequence_shards


def first_sequences(cut: Cut, groups: RankGroups) -> list[int]:
    """List the number of the first sequence of each of this rank's micro-batches, in order."""
    rank, ranks, _group = groups.batch
    return [
        (step * ranks + rank) * cut.local_batch_size + first
        for step in range(cut.accumulation_steps)
        for first in range(0, cut.local_batch_size, cut.micro_batch_size)
    ]

"""How a job cuts its global batch, and which part of it a rank holds.

The sequences of a global batch are numbered by accumulation step, then by
data-parallel rank, then by micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from torchtitan.distributed import ParallelDims

from titan_moe_lb.parallel import layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """The numbers of the cut."""

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
    """Ranks over which a router sees one sequence split: CP, and TP where EP is on."""
    context_parallel_load_balancer: str | None

    @property
    def num_micro_batches(self) -> int:
        """Forwards of one router in an optimizer step."""
        return self.accumulation_steps * (self.local_batch_size // self.micro_batch_size)

    @property
    def local_sequence_length(self) -> int:
        """Tokens of one sequence that one router sees."""
        return self.seq_len // self.sequence_shards


def cut(config) -> Cut:
    """Of a ``Trainer.Config``. Raises ``JobError``: the layout does not fit the processes."""
    dims = layout.resolve(config.parallelism)
    local = config.training.local_batch_size
    per_pass = local * dims.dp_replicate * dims.dp_shard
    total = config.training.global_batch_size
    total = per_pass if total < 0 else total
    pipelined = dims.pp > 1
    return Cut(
        global_batch_size=total,
        local_batch_size=local,
        micro_batch_size=(
            config.parallelism.pipeline_parallel_microbatch_size if pipelined else local
        ),
        accumulation_steps=total // per_pass,
        seq_len=config.training.seq_len,
        sequence_shards=dims.cp * (dims.tp if dims.ep > 1 else 1),
        context_parallel_load_balancer=config.parallelism.context_parallel_load_balancer,
    )


def first_sequences(cut: Cut, parallel_dims: ParallelDims) -> list[int]:
    """Number of the first sequence of each of this rank's micro-batches, in order."""
    ranks = parallel_dims.dp_replicate * parallel_dims.dp_shard
    rank = parallel_dims.get_mesh("batch").get_local_rank() if ranks > 1 else 0
    return [
        (step * ranks + rank) * cut.local_batch_size + first
        for step in range(cut.accumulation_steps)
        for first in range(0, cut.local_batch_size, cut.micro_batch_size)
    ]


def token_slices(
    length: int, parallel_dims: ParallelDims, load_balancer: str | None
) -> list[tuple[int, int]]:
    """(start, length) in a row of ``length`` tokens of those that a router of this rank sees.

    Context parallelism's "headtail" balancer gives rank r of n the r-th slice of 2 n and
    the r-th last; tensor parallelism then splits what a rank has.
    """
    pieces = [(0, length)]
    if parallel_dims.cp > 1:
        rank = parallel_dims.get_mesh("cp").get_local_rank()
        if load_balancer == "headtail":
            length = length // (2 * parallel_dims.cp)
            pieces = [(rank * length, length), ((2 * parallel_dims.cp - 1 - rank) * length, length)]
        else:
            length = length // parallel_dims.cp
            pieces = [(rank * length, length)]
    if parallel_dims.ep_enabled and parallel_dims.tp > 1:
        rank = parallel_dims.get_mesh("tp").get_local_rank()
        pieces = _part(pieces, rank, parallel_dims.tp)
    return pieces


def _part(pieces: list[tuple[int, int]], rank: int, num_ranks: int) -> list[tuple[int, int]]:
    """The rank-th of equal parts of the positions, in their order."""
    share = sum(length for _start, length in pieces) // num_ranks
    skip, part = rank * share, []
    for start, length in pieces:
        taken = max(0, min(length - skip, share))
        if taken > 0:
            part.append((start + max(skip, 0), taken))
            share -= taken
        skip = max(skip - length, 0)
    return part

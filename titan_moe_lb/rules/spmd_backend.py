"""Rules of ``parallelism.spmd_backend``: combinations with wrong gradients or no step."""

from __future__ import annotations

from titan_moe_lb.errors import JobError
from titan_moe_lb.parallel.layer_numbers import moe_layers
from titan_moe_lb.resolved_job import Job


def gradients_are_kept(job: Job) -> None:
    """Refuse layouts in which a DTensor backend loses gradients.

    Upstream fact: torch 2.14's ``local_map`` (``distributed/tensor/experimental/_func_map.py``)
    waits for a pending argument by ``AsyncCollectiveTensor.wait()``, and autograd loses it there.
    With one sequence, the tensors that torchtitan 0.3.0 gathers along the sequence are still
    pending. Several sequences are concatenated first, which waits for the collective.
    """
    parallelism = job.config.parallelism
    if (
        parallelism.spmd_backend == "spmd_types"
        or _blocks_are_compiled(job)
        or job.cut.micro_batch_size > 1
    ):
        return
    if (
        parallelism.tensor_parallel_degree > 1
        and parallelism.enable_sequence_parallel
        and parallelism.expert_parallel_degree == 1
        and moe_layers(job.config)
    ):
        lost, key = "through the experts", "tensor_parallel_degree"
    elif parallelism.spmd_backend == "full_dtensor" and parallelism.context_parallel_degree > 1:
        lost, key = "of keys and values", "context_parallel_degree"
    else:
        return
    raise JobError(
        f'parallelism.spmd_backend = "{parallelism.spmd_backend}" silently loses the gradient {lost} '
        f"under parallelism.{key} with one sequence a forward: set "
        'parallelism.spmd_backend = "spmd_types"'
    )


def blocks_can_be_traced(job: Job) -> None:
    """Refuse to compile blocks under ``full_dtensor`` if the tokens are sharded.

    Upstream fact: a linear layer flattens rows and tokens of a DTensor. If CP, or TP under EP,
    shards the tokens too, torch 2.14 raises ``PendingUnbackedSymbolNotFound`` in the first step,
    or hangs (pytorch/torchtitan#3409).
    """
    parallelism = job.config.parallelism
    cut = parallelism.context_parallel_degree > 1 or (
        parallelism.tensor_parallel_degree > 1 and parallelism.expert_parallel_degree > 1
    )
    if parallelism.spmd_backend == "full_dtensor" and cut and _blocks_are_compiled(job):
        raise JobError(
            'parallelism.spmd_backend = "full_dtensor" cannot be compiled with context '
            "parallelism, nor with tensor and expert parallelism together: set "
            'parallelism.spmd_backend = "spmd_types", or compile.enable = false'
        )


def cut_can_be_planned(job: Job) -> None:
    """Refuse ``full_dtensor`` with tensor and context parallelism together.

    Upstream fact: both shard the tokens, and torch 2.14 searches minutes for a redistribution of such
    a tensor (``find_min_cost_path`` in ``distributed/tensor/_redistribute.py``), or raises ``Cannot
    unflatten tensor with _StridedShard placement`` in a linear layer. The first step does not end,
    with torchtitan alone either.
    """
    parallelism = job.config.parallelism
    degrees = parallelism.tensor_parallel_degree, parallelism.context_parallel_degree
    if parallelism.spmd_backend == "full_dtensor" and min(degrees) > 1:
        raise JobError(
            'parallelism.spmd_backend = "full_dtensor" does not end its first step with tensor and '
            'context parallelism together: set parallelism.spmd_backend = "spmd_types"'
        )


def _blocks_are_compiled(job: Job) -> bool:
    return job.config.compile.enable and "model" in job.config.compile.components


RULES = (
    gradients_are_kept,
    blocks_can_be_traced,
    cut_can_be_planned,
)

"""A job as the cost model sees it: sizes, stages, schedule, and what its ranks hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from titan_moe_lb.costmodel.dispatch import Dispatcher
from titan_moe_lb.costmodel.layer import MoELayer
from titan_moe_lb.parallel.schedules import Schedule


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One pipeline stage. FLOPs and bytes are of one token, forward, before TP divides them."""

    moe_layers: tuple[int, ...]
    """Numbers of its MoE layers in the whole model."""
    num_layers: int
    dense_flops: float
    """Matrix products outside MoE layers, attention included."""
    dense_bytes: float
    """Kept for the backward outside MoE layers without checkpointing: an estimate, the
    inputs and results of the linear layers."""
    vocabulary: int = 0
    """Logits of a token, on the stage that has the head."""


@dataclass(frozen=True, kw_only=True)
class RankState:
    """What one rank holds whatever the routing does. Bytes are of its local shards."""

    rank: int
    num_parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    unsharded_bytes: int
    """FSDP's gathered parameters and unreduced gradients at their most."""

    @property
    def total_bytes(self) -> int:
        return (
            self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes + self.unsharded_bytes
        )


@dataclass(frozen=True, kw_only=True)
class JobModel:
    """A job as the cost model sees it, at one expert-parallel degree."""

    model_name: str
    flavor: str
    num_ranks: int
    ep_degree: int
    tp_degree: int
    moe_layers: dict[int, MoELayer]
    """By layer number in the whole model."""
    dim: int
    stages: tuple[Stage, ...]
    schedule: Schedule
    """Actions of each pipeline rank for one optimizer step without accumulation."""
    accumulation_steps: int
    tokens_per_microbatch: int
    """Tokens of one micro-batch on one rank, before TP splits the sequence."""
    checkpointing: str
    """"none", "selective", "full"."""
    tokens_per_step: int
    """Of the global batch."""
    steps: int
    """Optimizer steps of the whole job."""
    states: dict[int, RankState]
    """By pipeline rank, for those that were built."""
    dispatcher: Dispatcher = "standard"

    @property
    def tokens_per_rank(self) -> int:
        """Tokens that one rank routes: with EP, the ranks of TP route other tokens."""
        return self.tokens_per_microbatch // (self.tp_degree if self.ep_degree > 1 else 1)

    def in_turn(self, num_loads: int) -> np.ndarray:
        """Which of N recorded loads each micro-batch has, int ``(passes, micro-batches)``.

        As many passes through the schedule as it takes for each to have its turn.
        """
        per_pass = 1 + max(micro_batch for _stage, _kind, micro_batch in self.schedule[0])
        passes = -(-num_loads // per_pass)
        return np.arange(passes * per_pass).reshape(passes, per_pass) % num_loads

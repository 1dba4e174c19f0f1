"""Sizes of a job for the cost model: stages, schedule, and bytes of its ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from titan_moe_lb.costmodel.times.moe_layer import Dispatcher, MoELayer
from titan_moe_lb.parallel.schedules import Schedule


@dataclass(frozen=True, kw_only=True)
class Block:
    """Bytes of one transformer block, without its routed experts.

    All are per token of a rank. With TP a rank has 1/TP of the tokens.
    """

    moe_layer: int | None
    """Layer number in the whole model; None for a dense block."""
    attention: float
    """Saved for the backward by attention and the norm before it."""
    attention_forward: float
    """Further bytes while attention runs forward."""
    attention_backward: float
    """Further bytes while attention runs backward."""
    feed_forward: float
    """Saved by the norm after attention, the router, and the dense layer or shared experts."""
    selective: float
    """Saved by torchtitan's selective checkpointing, in place of all saved bytes above."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """Bytes of the last norm, the head and the loss, per token of a rank."""

    norm: float
    """Saved until the backward."""
    loss: float
    """Further bytes while the loss is computed."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One pipeline stage. FLOPs and bytes are per token in the forward, before TP divides them."""

    moe_layers: tuple[int, ...]
    """Numbers of its MoE layers in the whole model."""
    dense_flops: float
    """FLOPs of matrix products outside MoE layers, attention included."""
    dense_bytes: float
    """Bytes of the inputs and results of the blocks' linear layers outside the MoE."""
    vocabulary: int = 0
    """Logits of a token; 0 on a stage without the head."""
    blocks: tuple[Block, ...] = ()
    head: Head | None = None
    """None on a stage without the head."""


@dataclass(frozen=True, kw_only=True)
class RankState:
    """Bytes of a rank's local shards, which do not depend on the routing."""

    rank: int
    num_parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    unsharded_bytes: int
    """Peak of FSDP's gathered parameters and unreduced gradients."""

    @property
    def total_bytes(self) -> int:
        """Sum of the four byte counts."""
        return (
            self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes + self.unsharded_bytes
        )

    def peak_bytes(self, activations: float, accumulates: bool) -> float:
        """Compute the total with the activations at their peak.

        If gradients of earlier passes exist already (``accumulates``), they add up. In a single
        pass, gradients are allocated as activations are released.
        """
        gradients = self.gradient_bytes
        together = activations + gradients if accumulates else max(activations, gradients)
        return self.total_bytes - gradients + together


@dataclass(frozen=True, kw_only=True)
class JobModel:
    """Sizes of a job at one expert-parallel degree."""

    model_name: str
    flavor: str
    num_ranks: int
    ep_degree: int
    tp_degree: int
    moe_layers: dict[int, MoELayer]
    """MoE layers by number in the whole model."""
    dim: int
    stages: tuple[Stage, ...]
    schedule: Schedule
    """Actions of each pipeline rank for one optimizer step without accumulation."""
    accumulation_steps: int
    tokens_per_microbatch: int
    """Tokens of one micro-batch on one rank, before TP splits the sequence."""
    checkpointing: str
    """Activation checkpointing: "none", "selective" or "full"."""
    seq_len: int
    on_host: bool
    """True for torch's host backend, which runs attention and norms as several operators."""
    releases_buffers: bool
    """True if pipelining releases sent and received buffers, as torch does from 2.15 on."""
    tokens_per_step: int
    """Tokens of the global batch."""
    steps: int
    """Optimizer steps of the whole job."""
    states: dict[int, RankState]
    """States of the built ranks, by pipeline rank."""
    dispatcher: Dispatcher = "standard"

    @property
    def tokens_per_rank(self) -> int:
        """Tokens that one rank routes; with EP, each TP rank routes its part of the sequence."""
        return self.tokens_per_microbatch // (self.tp_degree if self.ep_degree > 1 else 1)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of one pass through the schedule."""
        return 1 + max(micro_batch for _stage, _kind, micro_batch in self.schedule[0])

    def in_turn(self, num_loads: int) -> np.ndarray:
        """Assign loads to micro-batches in turn, over as many passes as all loads need.

        Returns:
            Index of the load of each micro-batch, int ``(passes, micro-batches)``.
        """
        per_pass = self.num_micro_batches
        passes = -(-num_loads // per_pass)
        return np.arange(passes * per_pass).reshape(passes, per_pass) % num_loads

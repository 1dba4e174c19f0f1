"""A job as the cost model sees it: sizes, stages, schedule, and what its ranks hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from titan_moe_lb.costmodel.times.dispatch import Dispatcher
from titan_moe_lb.costmodel.times.layer import MoELayer
from titan_moe_lb.parallel.schedules import Schedule


@dataclass(frozen=True, kw_only=True)
class Block:
    """One transformer block outside its routed experts. Bytes are of one token of the rank,
    where TP gives a rank 1/TP of the tokens."""

    moe_layer: int | None
    """Layer number in the whole model; None for a dense block."""
    attention: float
    """Kept for the backward by attention and the norm before it."""
    attention_forward: float
    """There besides while attention runs forward."""
    attention_backward: float
    """There besides while it runs backward."""
    feed_forward: float
    """Kept by the norm after attention and by what follows: dense or shared experts, router."""
    selective: float
    """Share of all this that torchtitan's selective checkpointing keeps."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """The last norm, the head and the loss. Bytes are of one token of the rank."""

    norm: float
    """Kept until the backward."""
    loss: float
    """There besides while the loss is computed."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One pipeline stage. FLOPs and bytes are of one token, forward, before TP divides them."""

    moe_layers: tuple[int, ...]
    """Numbers of its MoE layers in the whole model."""
    dense_flops: float
    """Matrix products outside MoE layers, attention included."""
    dense_bytes: float
    """Inputs and results of the linear layers."""
    vocabulary: int = 0
    """Logits of a token, on the stage that has the head."""
    blocks: tuple[Block, ...] = ()
    head: Head | None = None
    """On the stage that has it."""


@dataclass(frozen=True, kw_only=True)
class RankState:
    """Bytes of a rank's local shards, which do not depend on the routing."""

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

    def peak_bytes(self, activations: float, accumulates: bool) -> float:
        """Total with the activations at their peak.

        Args:
            accumulates: gradients of the passes before are there already. Those of a single
                pass come as its activations go.
        """
        gradients = self.gradient_bytes
        together = activations + gradients if accumulates else max(activations, gradients)
        return self.total_bytes - gradients + together


@dataclass(frozen=True, kw_only=True)
class JobModel:
    """A job as the cost model sees it, at one expert-parallel degree."""

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
    """"none", "selective", "full"."""
    seq_len: int
    on_host: bool
    """Planned for torch's host backend, which composes attention and norms of operators."""
    releases_buffers: bool
    """Pipelining releases what it has sent and received, as torch does since 2.15."""
    tokens_per_step: int
    """Tokens of the global batch."""
    steps: int
    """Optimizer steps of the whole job."""
    states: dict[int, RankState]
    """States by pipeline rank, of the ranks that were built."""
    dispatcher: Dispatcher = "standard"

    @property
    def tokens_per_rank(self) -> int:
        """Tokens that one rank routes: with EP, the ranks of TP route other tokens."""
        return self.tokens_per_microbatch // (self.tp_degree if self.ep_degree > 1 else 1)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of one pass through the schedule."""
        return 1 + max(micro_batch for _stage, _kind, micro_batch in self.schedule[0])

    def in_turn(self, num_loads: int) -> np.ndarray:
        """Index of the recorded load of each micro-batch, int ``(passes, micro-batches)``.

        As many passes through the schedule as it takes for each to have its turn.
        """
        per_pass = self.num_micro_batches
        passes = -(-num_loads // per_pass)
        return np.arange(passes * per_pass).reshape(passes, per_pass) % num_loads

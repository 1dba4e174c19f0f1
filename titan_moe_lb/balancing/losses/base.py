"""Base classes of the router losses, and the way of one loss from TOML to gradient.

1. **TOML.** ``[[model.aux_losses]] type = "sequence_wise", weight = 1e-4`` becomes a
   ``SequenceWiseAuxLoss.Config``. :meth:`Component.__init_subclass__` has entered the class by its
   ``type_name``, so a loss of a user's own needs no registration.
2. **Config.** :meth:`AuxLoss.Config.bind` fills E and K of the router and ``local_batch_size`` of
   the job, before the model is built. Each router builds a loss of its own.
3. **Divisor.** torchtitan 0.3.0 sums gradients over data-parallel ranks, accumulation steps and
   pipeline micro-batches, and divides by nothing. A loss that is a mean over the G rows of a global
   batch is the sum over the rows of each micro-batch, divided by G, whichever way the batch is cut:

       G = local_batch_size x data-parallel ranks x accumulation steps

   :meth:`StepHook.begin_step` writes ``weight / G`` to the device once a step. It is the only place
   that divides.
4. **Forward.** :meth:`LoadBalancedRouter.forward` computes the scores s(t,i), chooses experts and
   calls the formula of each loss. It adds the raw value to the record of the step, for the metrics.
   A :class:`SumsLoss` sees two small tables for each sequence: the sums of the probabilities
   p(t,i) = s(t,i) / sum_j s(t,j) over its tokens, and the tokens of each expert. A
   :class:`LogitsLoss` sees the logits of each token.
5. **Gradient.** A loss reaches the router by gradient, not by value: the loss of the trainer is
   untouched. So it works on every pipeline stage, under every schedule, and with a loss that is
   computed in chunks. Counts are not differentiated. The gradient of a loss of sums in the sums is
   one coefficient for each sequence and expert, and all tokens of the sequence share it.
   :func:`titan_moe_lb.functional.gather_scores` picks the scores of the chosen experts. Its backward
   writes a tensor of the size of the scores anyway, and starts it from these coefficients instead
   of from zeros. Losses of sums so cost no pass of their own. :meth:`LogitsLoss.attach` adds its
   gradient to that of the logits.
6. **Optimizer.** The gate learns from the sum of both gradients. Then
   :meth:`StepHook.close_step` divides the recorded values by G and closes the step.

To add a loss, derive from one of the two kinds and write the formula; docs/howto/add_a_loss.md
has an example.

Shape suffixes: B = sequences of a micro-batch, L = tokens of a sequence, E = experts, K = top_k,
A = losses, N = layers of a rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from titan_moe_lb.balancing.component import Component, require_formula
from titan_moe_lb.balancing.recording.recomputation import is_recomputation
from titan_moe_lb.balancing.recording.sequence_tables import CountSource, SequenceTables
from titan_moe_lb.balancing.recording.step_record import RouterRecord
from titan_moe_lb.balancing.valid_tokens.batch_tokens import BatchTokens, Sequences
from titan_moe_lb.balancing.value_schedule import Change, check_changes, value_at
from titan_moe_lb.errors import JobError
from titan_moe_lb.functional import at_least_float32
from titan_moe_lb.parallel.rank_groups import RankGroups


class AuxLoss(Component):
    """A loss on the router. See the module docstring.

    Attributes:
        index: place among the losses of the router, and in its record.
        groups: process groups of the rank, once the router is wired.
    """

    additive: ClassVar[bool] = True
    """The loss of a batch is the sum over its sequences. Otherwise it is refused under pipeline
    parallelism and gradient accumulation, which cut the batch."""

    metric_name: ClassVar[str]
    """Name of the raw, unweighted value in the metrics, without the ``moe/`` prefix."""

    kinds: ClassVar[dict[str, type[AuxLoss]]] = {}
    """Losses that can be configured, by ``type_name``."""

    filled_by_job: ClassVar[frozenset[str]] = frozenset(
        {"num_experts", "top_k", "local_batch_size"}
    )

    @dataclass(kw_only=True, slots=True)
    class Config(Component.Config):
        weight: float
        """Factor of the loss, alpha in the papers. Positive; leave the loss out for none."""

        changes: list[Change] = field(default_factory=list)
        """When the weight changes, and to what."""

        num_experts: int | None = None
        """E of the router. Filled by :meth:`bind`."""

        top_k: int | None = None
        """K of the router. Filled by :meth:`bind`."""

        local_batch_size: int | None = None
        """Rows of a data-parallel rank in an accumulation step, by which the loss is normalised.
        Filled by :meth:`bind`; None in a training loop that announces its rows."""

        @property
        def documents(self) -> int | None:
            """Documents of a row that are its sequences; None where a row is one sequence. A loss
            of sums may override it."""
            return None

        @property
        def expert_groups(self) -> int:
            """Equal groups of neighbouring experts in the formula; a new order of the experts keeps
            each group together."""
            return 1

        def __post_init__(self) -> None:
            if not math.isfinite(self.weight) or self.weight <= 0:
                raise JobError(
                    f"aux loss weight is {self.weight}; it must be a finite number above 0 "
                    "(to train without the loss, leave it out of aux_losses)"
                )
            check_changes("aux loss", self.changes)

        def bind(
            self, *, num_experts: int, top_k: int, local_batch_size: int | None = None
        ) -> None:
            """Fill in the numbers of the router and of the job."""
            self.num_experts, self.top_k = num_experts, top_k
            self.local_batch_size = local_batch_size

    def __init__(self, config: Config) -> None:
        super().__init__()
        _check_formula(type(self))
        if config.num_experts is None or config.top_k is None:
            raise JobError(
                f"{type(self).__name__} was built before it was bound to a router: use "
                "titan_moe_lb.balanced(spec, aux_losses=[...])"
            )
        self.config = config
        self.num_experts = config.num_experts
        self.top_k = config.top_k
        self.index = 0
        self.groups = RankGroups()

    def weight_at(self, step: int, tokens: int) -> float:
        """Weight in a step; see :func:`titan_moe_lb.balancing.value_schedule.value_at`."""
        return value_at(self.config.weight, self.config.changes, step, tokens)

    @property
    def needs_step_counts(self) -> bool:
        """Whether :meth:`finish_step` needs the counts of every step, over all ranks."""
        return False

    @classmethod
    def finish_step(cls, losses: Sequence[AuxLoss], counts_NE: torch.Tensor | None) -> None:
        """Update the losses of a rank's N layers at once, before the optimizer steps.

        Args:
            losses: this kind's loss of each layer.
            counts_NE: tokens per expert in the step over all ranks and micro-batches, int64
                ``(N, E)``, counted as the losses count; None unless ``needs_step_counts``.
        """


class SumsLoss(AuxLoss):
    """A loss that is a function of the sums of probabilities and of the counts of sequences."""

    linear: ClassVar[bool] = False
    """The coefficients do not depend on the sums: such a class defines :meth:`coefficients` alone.
    A rank that holds a part of a sequence then uses its own sums; otherwise they are summed over
    the ranks that share the sequence."""

    count_groups: int = 1
    """Above 1: count tokens with any expert of one of so many equal groups of neighbours, once
    each, at every expert of the group."""

    @dataclass(kw_only=True, slots=True)
    class Config(AuxLoss.Config):
        count_from: Literal["selected", "scores"] = "selected"
        """What is counted: the experts that were selected (after expert bias and group
        limit), or the top-K of the unbiased scores (DeepSeek-V3, Eq. 18)."""

    source: int = 0
    """Place of :attr:`count_source` in the tables of the router, once it is wired."""

    @property
    def count_source(self) -> CountSource:
        """What the loss counts."""
        return CountSource(self.config.count_from, self.count_groups)

    @property
    def needs_counts(self) -> bool:
        """Whether :meth:`value` needs the counts of the forward."""
        return True

    def value(
        self, sums_BE: torch.Tensor, counts_BE: torch.Tensor | None, sequences: Sequences
    ) -> torch.Tensor:
        """Formula of the loss, before it is divided by the rows of the global batch.

        Args:
            sums_BE: ``sum_t p(t,i)`` over the valid tokens of whole sequences, float32
                ``(B, E)``. A sequence without any has those of one balanced token.
            counts_BE: valid tokens of each expert in whole sequences, int64 ``(B, E)``; None
                unless ``needs_counts``.
            sequences: valid tokens of each, and its share of a row.

        Returns:
            Scalar, unweighted, differentiable in the sums: the sum over the sequences of
            each one's loss times its share.
        """
        return (self.coefficients(sums_BE, counts_BE, sequences) * sums_BE).sum()

    def coefficients(
        self, sums_BE: torch.Tensor, counts_BE: torch.Tensor | None, sequences: Sequences
    ) -> torch.Tensor:
        """Gradient of :meth:`value` in the sums, ``(B, E)``, or ``(1, E)`` where all
        sequences have the same. Overridden in a linear loss, and where a closed form is cheaper."""
        return _gradient(lambda sums: self.value(sums, counts_BE, sequences), sums_BE)

    def apply(
        self,
        tables: SequenceTables,
        record: RouterRecord,
        save: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Coefficients of a forward, float32. Adds the raw value to the record, once.

        Args:
            save: makes a checkpointing policy save a tensor. What a repeated forward must not
                compute again goes through it before the first forward uses it: a compiler would
                otherwise leave it all to the backward.
        """
        documents = self.config.documents is not None
        sequences = tables.sequences(documents=documents)
        sums_BE = tables.sums(documents=documents, whole=not self.linear)
        counts_BE = None
        if self.needs_counts:
            counts_BE = tables.counts(self.source, documents=documents)
        if not self.linear and isinstance(sequences.share, torch.Tensor):
            # A formula may divide by what an empty sequence has none of.
            sums_BE = sums_BE.masked_fill(sequences.share == 0, 1 / sums_BE.shape[-1])
        coefficients_BE = save(self.coefficients(sums_BE, counts_BE, sequences).float())
        if is_recomputation():
            return coefficients_BE
        if self.linear:
            record.add_dot(self.index, coefficients_BE, sums_BE)
        else:
            value = self.value(sums_BE, counts_BE, sequences)
            record.losses_A[self.index].add_(value, alpha=1 / self.groups.sequence_shards)
        return coefficients_BE


class LogitsLoss(AuxLoss):
    """A loss that is a mean over the tokens of a function of each token's logits."""

    def per_token(self, logits_BLE: torch.Tensor) -> torch.Tensor:
        """Formula of the loss of each token, unweighted.

        Args:
            logits_BLE: gate outputs before the score function, float32 ``(B, L, E)``.

        Returns:
            ``(B, L)``, differentiable in the logits.
        """
        raise NotImplementedError

    def per_token_and_saved(
        self, logits_BLE: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """:meth:`per_token`, and a small tensor of it that saves :meth:`logits_gradient` work."""
        return self.per_token(logits_BLE), None

    def logits_gradient(self, logits_BLE: torch.Tensor, saved: torch.Tensor | None) -> torch.Tensor:
        """Gradient of ``per_token(logits).sum()``, ``(B, L, E)``. Overridden where a closed
        form is cheaper."""
        return _gradient(lambda logits: self.per_token(logits).sum(), logits_BLE)

    def attach(
        self, logits_BLE: torch.Tensor, tokens: BatchTokens | None, record: RouterRecord
    ) -> torch.Tensor:
        """The logits themselves; the backward adds the weighted gradient of the loss.

        Args:
            logits_BLE: local gate outputs ``(B, L, E)``.
            tokens: which are valid; None for all.
            record: receives the raw value, once.
        """
        with torch.no_grad():
            per_token_BL, saved = self.per_token_and_saved(at_least_float32(logits_BLE))
            weight, share = record.weights_A[self.index], 1.0
            if tokens is None:
                share = 1 / (logits_BLE.shape[1] * self.groups.sequence_shards)
            else:
                per_token_BL = per_token_BL * tokens.token_share_BL
                weight = weight * tokens.token_share_BL.unsqueeze(-1)
            if not is_recomputation():
                record.losses_A[self.index].add_(per_token_BL.sum(), alpha=share)
        return _Attach.apply(logits_BLE, saved, weight, self, share)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_BLE, saved, weight, loss, scale):
        ctx.save_for_backward(logits_BLE, saved, weight)
        ctx.loss, ctx.scale = loss, scale
        return logits_BLE.view_as(logits_BLE)

    @staticmethod
    def backward(ctx, grad_BLE: torch.Tensor):
        logits_BLE, saved, weight = ctx.saved_tensors
        gradient_BLE = ctx.loss.logits_gradient(at_least_float32(logits_BLE), saved)
        gradient_BLE, weight = gradient_BLE.to(grad_BLE.dtype), weight.to(grad_BLE.dtype)
        return torch.addcmul(grad_BLE, gradient_BLE, weight, value=ctx.scale), *[None] * 4


def _gradient(function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    """Gradient of a scalar function by autograd; also inside a forward that is checkpointed."""
    if torch.compiler.is_compiling():
        return torch.func.grad(function)(at)
    # torch.func has no way past the hooks of a checkpoint, which would repeat the forward here.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_same, _same):
        at = at.detach().requires_grad_()
        return torch.autograd.grad(function(at), at)[0]


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _check_formula(loss: type[AuxLoss]) -> None:
    """Raises ``JobError``: a router does not know how to apply such a loss."""
    if issubclass(loss, SumsLoss):
        formula = "coefficients" if loss.linear else "value"
        require_formula("aux loss", loss, SumsLoss, formula)
    elif issubclass(loss, LogitsLoss):
        require_formula("aux loss", loss, LogitsLoss, "per_token")
    else:
        raise JobError(
            f"the aux loss {loss.__name__} is neither a SumsLoss nor a LogitsLoss, so that no "
            "router knows how to apply it: derive it from one of the two"
        )

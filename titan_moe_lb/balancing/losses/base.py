"""Base classes of the router losses, and the path of a loss from TOML to gradient.

1. **TOML.** ``[[model.aux_losses]] type = "sequence_wise", weight = 1e-4`` becomes a
   ``SequenceWiseAuxLoss.Config``. :meth:`Component.__init_subclass__` has added the class to
   ``kinds`` by its ``type_name``, so a user's own loss needs no registration.
2. **Config.** ``LoadBalancedRouter.Config.bind`` fills in E and K of the router and
   ``local_batch_size`` of the job, before the model is built. Each router builds its own loss.
3. **Divisor.** torchtitan 0.3.0 sums gradients over data-parallel ranks, accumulation steps and
   pipeline micro-batches, and does not divide them. A mean over the G rows of a global batch is
   therefore the sum over the rows of each micro-batch divided by G, however the batch is cut:

       G = local_batch_size x data-parallel ranks x accumulation steps

   :meth:`StepHook.begin_step` writes ``weight / G`` to the device once a step. No other code
   divides the gradient.
4. **Forward.** :meth:`LoadBalancedRouter.forward` computes the scores s(t,i), chooses experts and
   calls the formula of each loss. It adds the raw value to the record of the step, for the metrics.
   A :class:`SumsLoss` reads two small tables for each sequence: the sums of the probabilities
   p(t,i) = s(t,i) / sum_j s(t,j) over its tokens, and the tokens of each expert. A
   :class:`LogitsLoss` reads the logits of each token.
5. **Gradient.** A loss reaches the router by gradient, not by value; the trainer's loss does not
   change. A loss therefore works on every pipeline stage, under every schedule, and if the
   trainer's loss is computed in chunks. Counts are not differentiated. The gradient of a loss of
   sums in the sums is one coefficient for each sequence and expert, shared by all its tokens.
   :func:`titan_moe_lb.functional.gather_scores` gathers the scores of the chosen experts. Its
   backward fills a tensor of the size of the scores anyway, and starts from these coefficients
   instead of zeros. Losses of sums thus write no other tensor of this size. :meth:`LogitsLoss.attach` adds its
   gradient to the gradient of the logits.
6. **Optimizer.** The gate learns from the sum of both gradients. Then
   :meth:`StepHook.close_step` divides the recorded values by G and closes the step.

To add a loss, derive from one of the two classes and write the formula; docs/howto/add_a_loss.md
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
    """Base class of a loss on the router; see the module docstring.

    Attributes:
        index: index among the losses of the router, and in its record.
        groups: process groups of the rank, once the router is wired.
    """

    additive: ClassVar[bool] = True
    """True if the loss of a batch is the sum over its sequences. Other losses are refused under
    pipeline parallelism and gradient accumulation, which cut the batch."""

    metric_name: ClassVar[str]
    """Name of the raw, unweighted value in the metrics, without the ``moe/`` prefix."""

    kinds: ClassVar[dict[str, type[AuxLoss]]] = {}
    """Configurable losses, by ``type_name``."""

    filled_by_job: ClassVar[frozenset[str]] = frozenset(
        {"num_experts", "top_k", "local_batch_size"}
    )

    @dataclass(kw_only=True, slots=True)
    class Config(Component.Config):
        weight: float
        """Factor of the loss, alpha in the papers; above 0. For no loss, leave it out."""

        changes: list[Change] = field(default_factory=list)
        """Changes of the weight during training."""

        num_experts: int | None = None
        """E of the router. Filled by :meth:`bind`."""

        top_k: int | None = None
        """K of the router. Filled by :meth:`bind`."""

        local_batch_size: int | None = None
        """Rows of a data-parallel rank in an accumulation step, which normalize the loss. Filled by
        the router's ``bind``; None in a training loop that announces its rows."""

        @property
        def documents(self) -> int | None:
            """Documents of a row that are sequences of the loss; None if a row is one sequence."""
            return None

        @property
        def expert_groups(self) -> int:
            """Equal groups of neighboring experts, kept together in a new order of the experts."""
            return 1

        def __post_init__(self) -> None:
            if not math.isfinite(self.weight) or self.weight <= 0:
                raise JobError(
                    f"aux loss weight is {self.weight}; it must be a finite number above 0 "
                    "(to train without the loss, leave it out of aux_losses)"
                )
            check_changes("aux loss", self.changes)

        def bind(self, *, num_experts: int, top_k: int) -> None:
            """Fill in the numbers of the router."""
            self.num_experts, self.top_k = num_experts, top_k

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
        """Return the weight in a step; see ``value_schedule.value_at``."""
        return value_at(self.config.weight, self.config.changes, step, tokens)

    @property
    def needs_step_counts(self) -> bool:
        """True if :meth:`finish_step` needs the counts of every step, over all ranks."""
        return False

    @classmethod
    def finish_step(cls, losses: Sequence[AuxLoss], counts_NE: torch.Tensor | None) -> None:
        """Update the losses of a rank's N layers at once, before the optimizer steps.

        ``counts_NE`` are the tokens per expert in the step over all ranks and micro-batches, int64,
        from the losses' count source; None unless ``needs_step_counts``.
        """


class SumsLoss(AuxLoss):
    """Base class of losses that depend on the probability sums and token counts of sequences."""

    linear: ClassVar[bool] = False
    """True if the coefficients do not depend on the sums; the class then defines only
    :meth:`coefficients`. A rank with a part of a sequence then uses its own sums; otherwise the
    ranks that share the sequence sum theirs."""

    count_groups: int = 1
    """Above 1: number of equal groups of neighboring experts. A token counts once for each group
    that it reaches, at every expert of the group."""

    @dataclass(kw_only=True, slots=True)
    class Config(AuxLoss.Config):
        count_from: Literal["selected", "scores"] = "selected"
        """Experts that are counted: those selected (after expert bias and group limit), or the
        top-K of the unbiased scores (DeepSeek-V3, Eq. 18)."""

    source: int = 0
    """Index of :attr:`count_source` in the tables of the router, once it is wired."""

    @property
    def count_source(self) -> CountSource:
        """Source of the loss's counts."""
        return CountSource(self.config.count_from, self.count_groups)

    @property
    def needs_counts(self) -> bool:
        """True if the formula needs the counts of the forward."""
        return True

    def value(
        self, sums_BE: torch.Tensor, counts_BE: torch.Tensor | None, sequences: Sequences
    ) -> torch.Tensor:
        """Compute the loss, before the division by the rows of the global batch.

        Args:
            sums_BE: ``sum_t p(t,i)`` over the valid tokens of whole sequences, float32
                ``(B, E)``. A sequence without valid tokens has the sums of one balanced token,
                and a count of 1 for each expert; of a loss that is not ``additive``, only where
                no sequence of the batch has valid tokens.
            counts_BE: valid tokens that chose each expert in whole sequences, int64 ``(B, E)``;
                None unless ``needs_counts``.
            sequences: valid tokens of each sequence, and its share of a row.

        Returns:
            Scalar, unweighted, differentiable in the sums: each sequence's loss times its share.
        """
        return (self.coefficients(sums_BE, counts_BE, sequences) * sums_BE).sum()

    def coefficients(
        self, sums_BE: torch.Tensor, counts_BE: torch.Tensor | None, sequences: Sequences
    ) -> torch.Tensor:
        """Compute the gradient of :meth:`value` in the sums, ``(B, E)``, or ``(1, E)`` if shared.

        A linear loss overrides it, and so does a loss with a cheaper closed form.
        """
        return _gradient(lambda sums: self.value(sums, counts_BE, sequences), sums_BE)

    def contribute(
        self,
        tables: SequenceTables,
        record: RouterRecord,
        save: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Compute the coefficients of a forward, float32, and add the raw value to the record.

        Results that a recomputed forward reuses pass through ``save`` before their first use; a
        checkpointing policy saves them. A compiler would otherwise move their whole computation to
        the backward. A recomputed forward adds nothing.
        """
        documents = self.config.documents is not None
        sequences = tables.sequences(documents=documents)
        sums_BE = tables.sums(documents=documents, whole=not self.linear)
        counts_BE = tables.counts(self.source, documents=documents) if self.needs_counts else None
        if isinstance(sequences.share, torch.Tensor):
            # The formula may divide by sums and counts, which an empty sequence would leave at 0.
            empty_B1 = sequences.share == 0
            is_empty = empty_B1 if self.additive else empty_B1.all()
            if not self.linear:
                sums_BE = sums_BE.masked_fill(is_empty, 1 / self.num_experts)
            if counts_BE is not None:
                counts_BE = counts_BE.masked_fill(is_empty, 1)
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
    """Base class of losses that average a function of each token's logits."""

    def per_token(self, logits_BLE: torch.Tensor) -> torch.Tensor:
        """Compute the loss of each token, unweighted.

        Args:
            logits_BLE: gate outputs before the score function, float32 ``(B, L, E)``.

        Returns:
            ``(B, L)``, differentiable in the logits.
        """
        raise NotImplementedError

    def per_token_and_saved(
        self, logits_BLE: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute :meth:`per_token`, and a small tensor that :meth:`add_gradient` reuses."""
        return self.per_token(logits_BLE), None

    def add_gradient(self, grad_BLE, logits_BLE, saved, weight, scale) -> torch.Tensor:
        """Add ``scale * weight`` times the gradient of ``per_token(logits).sum()`` to another one.

        ``saved`` is the second result of :meth:`per_token_and_saved`; ``weight`` is ``()``, or
        ``(B, L, 1)``. A loss with a cheaper closed form overrides it, and does not change ``grad_BLE``.
        """
        own_BLE = _gradient(lambda logits: self.per_token(logits).sum(), logits_BLE)
        return torch.addcmul(grad_BLE, own_BLE, weight, value=scale)

    def attach(
        self, logits_BLE: torch.Tensor, tokens: BatchTokens | None, record: RouterRecord
    ) -> torch.Tensor:
        """Return the logits; the backward adds the weighted gradient of the loss."""
        with torch.no_grad():
            per_token_BL, saved = self.per_token_and_saved(at_least_float32(logits_BLE))
            weight, share = record.weights_A.select(0, self.index), 1.0
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
        wide_BLE = at_least_float32(logits_BLE)
        wide_grad_BLE = grad_BLE.to(wide_BLE.dtype)
        sum_BLE = ctx.loss.add_gradient(wide_grad_BLE, wide_BLE, saved, weight, ctx.scale)
        return sum_BLE.to(grad_BLE.dtype), *[None] * 4


def _gradient(function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    """Compute the gradient of a scalar function by autograd, also in a checkpointed forward."""
    if torch.compiler.is_compiling():
        return torch.func.grad(function)(at)
    # torch.func cannot bypass the hooks of a checkpoint, which would recompute the forward here.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_same, _same):
        at = at.detach().requires_grad_()
        return torch.autograd.grad(function(at), at)[0]


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _check_formula(loss: type[AuxLoss]) -> None:
    """Raise ``JobError`` for a loss without formula, or that a router cannot apply."""
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

"""What every router loss shares, and the two kinds of losses that a router can apply."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from titan_moe_lb.balancing.component import Component, require_formula
from titan_moe_lb.balancing.valid_tokens.batch_tokens import Sequences
from titan_moe_lb.balancing.value_schedule import Change, check_changes, value_at
from titan_moe_lb.errors import JobError
from titan_moe_lb.parallel.rank_groups import RankGroups


class AuxLoss(Component):
    """A loss on the router, normalised so that a global batch can be cut anywhere.

    torchtitan 0.3.0 sums gradients over data-parallel ranks, accumulation steps and
    pipeline micro-batches, and divides by nothing. A loss that is a mean over the G rows
    of the global batch is therefore what each micro-batch contributes as the sum over its
    own, divided by G: the same whichever way the batch was cut. A loss is that sum; what
    divides by G stands in one place, :meth:`titan_moe_lb.balancing.step_hook.StepHook.begin_step`.

    A loss of one's own derives from one of the two kinds below, names itself in
    ``type_name`` and ``metric_name``, and writes down its formula; docs/howto/add_a_loss.md has
    a worked example.

    Shape suffixes: B = sequences of a micro-batch, L = tokens of a sequence, E = experts,
    K = top_k, G = sequences of the global batch.
    """

    additive: ClassVar[bool] = True
    """The loss of a batch is the sum of what its sequences contribute. Where it is not, it
    is refused under pipeline parallelism and gradient accumulation, which cut the batch."""

    metric_name: ClassVar[str]
    """Name of the raw, unweighted value in the metrics, without the ``moe/`` prefix."""

    kinds: ClassVar[dict[str, type[AuxLoss]]] = {}
    """Every loss that can be configured, by ``type_name``."""

    filled_by_job: ClassVar[frozenset[str]] = frozenset({"num_experts", "top_k"})
    """Fields of the Config that :meth:`Config.bind` fills."""

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

        @property
        def documents(self) -> int | None:
            """Where the documents of a row are its sequences: how many are told apart. None
            where a row is one sequence. A loss of sums may override it."""
            return None

        @property
        def expert_groups(self) -> int:
            """Into how many equal groups of neighbours the formula divides the experts; 1 where
            it does not. What puts experts in another order keeps a group together."""
            return 1

        def __post_init__(self) -> None:
            if not math.isfinite(self.weight) or self.weight <= 0:
                raise JobError(
                    f"aux loss weight is {self.weight}; it must be a finite number above 0 "
                    "(to train without the loss, leave it out of aux_losses)"
                )
            check_changes("aux loss", self.changes)

        def bind(self, *, num_experts: int, top_k: int) -> None:
            """Take what the loss needs of its router."""
            self.num_experts = num_experts
            self.top_k = top_k

    def __init__(self, config: Config) -> None:
        super().__init__()
        if config.num_experts is None or config.top_k is None:
            raise JobError(
                f"{type(self).__name__} was built before it was bound to a router: use "
                "titan_moe_lb.balanced(spec, aux_losses=[...])"
            )
        self.config = config
        self.num_experts = config.num_experts
        self.top_k = config.top_k

    def weight_at(self, step: int, tokens: int) -> float:
        """The weight in a step; see :func:`titan_moe_lb.balancing.value_schedule.value_at`."""
        return value_at(self.config.weight, self.config.changes, step, tokens)

    @property
    def needs_step_counts(self) -> bool:
        """Whether the loss takes the counts of every finished step, over all ranks."""
        return False

    def wire(self, groups: RankGroups) -> None:
        """Take the process groups, for a loss that communicates. Once, before training."""

    @classmethod
    def finish_step(cls, losses: Sequence[AuxLoss], counts_NE: torch.Tensor | None) -> None:
        """The optimizer is about to step. For the losses of a rank's N layers at once.

        Args:
            losses: this kind's loss of each layer.
            counts_NE: tokens per expert in the step over all ranks and micro-batches, int64
                ``(N, E)``, of the source that the losses count from; None unless
                ``needs_step_counts``.
        """


class SumsLoss(AuxLoss):
    """A loss that is a function of two small tables: sums of probabilities, and counts.

    With s(t,i) the score of token t for expert i and p(t,i) = s(t,i) / sum_j s(t,j), the
    tables hold for each sequence ``sum_t p(t,i)`` and how many tokens count for expert i.
    The counts are not differentiated. So the gradient in the sums is one coefficient for
    each sequence and expert, and every token of a sequence gets the same ones
    (:mod:`titan_moe_lb.balancing.losses.injection`): nothing of the size of the scores is kept.
    """

    linear: ClassVar[bool] = False
    """The coefficients do not depend on the sums. Then a rank that holds a part of a
    sequence needs no one else's sums; else they are summed over the ranks that share it."""

    @dataclass(kw_only=True, slots=True)
    class Config(AuxLoss.Config):
        count_from: Literal["selected", "scores"] = "selected"
        """What is counted: the experts that were selected (after expert bias and group
        limit), or the top-K of the unbiased scores (DeepSeek-V3, Eq. 18)."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.count_from = config.count_from

    count_groups: int = 1
    """Counts are of single experts; or, where it is larger, of so many equal groups of
    neighbours: tokens with any expert of the group, once each, at every expert of it."""

    @property
    def needs_counts(self) -> bool:
        """Whether the tokens at hand have to be counted."""
        return True

    def value(
        self, sums_BE: torch.Tensor, counts_BE: torch.Tensor | None, sequences: Sequences
    ) -> torch.Tensor:
        """The formula: what these sequences contribute, before it is divided by the rows of the
        global batch.

        Args:
            sums_BE: ``sum_t p(t,i)`` over the valid tokens of whole sequences, float32
                ``(B, E)``. A sequence without any has those of one balanced token.
            counts_BE: valid tokens that count for each expert in whole sequences, int64
                ``(B, E)``; None unless ``needs_counts``.
            sequences: how many valid tokens each has, and its share of a row.

        Returns:
            Scalar, unweighted, differentiable in the sums: the sum over the sequences of
            each one's loss times its share.
        """
        raise NotImplementedError

    def coefficients(
        self, sums_BE: torch.Tensor, counts_BE: torch.Tensor | None, sequences: Sequences
    ) -> torch.Tensor:
        """Gradient of :meth:`value` in the sums, ``(B, E)``, or ``(1, E)`` where all
        sequences have the same. Overridden where a closed form is cheaper."""
        return _gradient(lambda sums: self.value(sums, counts_BE, sequences), sums_BE)


class LogitsLoss(AuxLoss):
    """A loss that is a mean over the tokens of a function of each token's logits."""

    def per_token(self, logits_BLE: torch.Tensor) -> torch.Tensor:
        """The formula: the loss of each token, unweighted.

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


def _gradient(function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    """Of a scalar function, by autograd; also inside a forward that is being checkpointed."""
    if torch.compiler.is_compiling():
        return torch.func.grad(function)(at)
    # torch.func has no way past the hooks of a checkpoint, which would repeat the forward here.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_same, _same):
        at = at.detach().requires_grad_()
        return torch.autograd.grad(function(at), at)[0]


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def check_kind(loss: type[AuxLoss]) -> None:
    """Raises ``JobError``: a router does not know how to apply such a loss."""
    for kind, formula in ((SumsLoss, "value"), (LogitsLoss, "per_token")):
        if issubclass(loss, kind):
            require_formula("aux loss", loss, kind, formula)
            return
    raise JobError(
        f"the aux loss {loss.__name__} is neither a SumsLoss nor a LogitsLoss, so that no router "
        "knows how to apply it: derive it from one of the two"
    )

"""What every router loss shares: its configuration and the normalisation contract."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torchtitan.protocols.module import Module

from titan_moe_lb.errors import JobError
from titan_moe_lb.parallel import batch_cut


class AuxLoss(Module):
    """A loss on the router, normalised so that a global batch can be cut anywhere.

    torchtitan 0.3.0 sums gradients over data-parallel ranks, accumulation steps
    and pipeline micro-batches, and divides by nothing. Each micro-batch therefore
    contributes

        weight * (sequences in it / local_batch_size) * (local_batch_size / global_batch_size)

    times its mean over its sequences, which is ``weight / global_batch_size``
    times the sum over its sequences: the same whichever way the batch was cut.
    """

    type_name: ClassVar[str]
    """Name of the loss in a job config: ``type = "..."``."""

    metric_name: ClassVar[str]
    """Name of the raw, unweighted value in the metrics, without the ``moe/`` prefix."""

    kinds: ClassVar[dict[str, type[AuxLoss]]] = {}
    """Every loss that can be configured, by ``type_name``. A subclass that defines a
    ``type_name`` enters itself, so that a loss of one's own needs no registration."""

    filled_by_job: ClassVar[frozenset[str]] = frozenset(
        {"local_batch_size", "global_batch_size", "num_experts"}
    )
    """Fields of the Config that ``update_from_config`` fills."""

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if "type_name" in cls.__dict__:
            AuxLoss.kinds[cls.type_name] = cls

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        weight: float
        """Factor of the loss, alpha in the papers. Positive; leave the loss out for none."""

        local_batch_size: int | None = None
        """Sequences of one rank in one accumulation step. Filled by ``update_from_config``."""

        global_batch_size: int | None = None
        """Sequences of one optimizer step. Filled by ``update_from_config``."""

        def __post_init__(self) -> None:
            if not math.isfinite(self.weight) or self.weight <= 0:
                raise JobError(
                    f"aux loss weight is {self.weight}; it must be a finite number above 0 "
                    "(to train without the loss, leave it out of aux_losses)"
                )

        num_experts: int | None = None
        """E of the router. Filled by ``update_from_config``."""

        def update_from_config(self, *, config, num_experts: int) -> None:
            """Take the batch sizes from a ``Trainer.Config`` and E from the router."""
            cut = batch_cut.cut(config)
            self.local_batch_size = cut.local_batch_size
            self.global_batch_size = cut.global_batch_size
            self.num_experts = num_experts

    def __init__(self, config: Config) -> None:
        super().__init__()
        if config.global_batch_size is None or config.num_experts is None:
            raise JobError(
                f"{type(self).__name__} was built before it was bound to a job: the model config's "
                "update_from_config(config=...) has to run before build()"
            )
        self.weight = config.weight
        self.global_batch_size = config.global_batch_size
        self.num_experts = config.num_experts

    @property
    def needs_step_counts(self) -> bool:
        """Whether the loss takes the counts of every finished step, over all ranks."""
        return False

    def wire_meshes(self, parallel_dims) -> None:
        """Take the process groups that the loss communicates over, if any."""


class LoadBalanceLoss(AuxLoss):
    """sum_i f_i P_i; the subclasses differ in what they count f over.

    f is not differentiated, so that the loss is linear in the sums of the
    probabilities: ``sum_be c[b,e] * sum_l p(b,l,e)`` with ``c = f / (L *
    global_batch_size)``. A router adds up the coefficients of its losses and
    propagates them once.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(AuxLoss.Config):
        count_from: Literal["selected", "scores"] = "selected"
        """What f counts: the experts that were selected (after expert bias and group
        limit), or the top-K of the unbiased scores (DeepSeek-V3, Eq. 18)."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.count_from = config.count_from

    @property
    def needs_counts(self) -> bool:
        """Whether f depends on the tokens at hand, so that they have to be counted."""
        return True

    def load(
        self, counts_BE: torch.Tensor | None, top_k: int, sequence_length: int
    ) -> torch.Tensor:
        """f of this loss, ``(B, E)`` or ``(1, E)``.

        Args:
            counts_BE: tokens per sequence and expert, whole sequences, float32; None
                unless ``needs_counts``.
            top_k: K.
            sequence_length: tokens of a whole sequence.
        """
        raise NotImplementedError

    def coefficients(
        self, counts_BE: torch.Tensor | None, top_k: int, sequence_length: int
    ) -> torch.Tensor:
        """Gradient of the unweighted loss in the sums of the probabilities.

        Args: as :meth:`load`. Returns ``(B, E)`` or ``(1, E)``, float32.
        """
        load = self.load(counts_BE, top_k, sequence_length)
        return load / (sequence_length * self.global_batch_size)

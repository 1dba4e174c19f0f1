"""Load-balancing loss over the global batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from titan_moe_lb.balancing.losses.base import SumsLoss
from titan_moe_lb.balancing.recording.recomputation import is_recomputation
from titan_moe_lb.balancing.valid_tokens.batch_tokens import Sequences
from titan_moe_lb.parallel.local_shard import local_shard
from titan_moe_lb.upstream.torch_internals import all_reduce


class GlobalBatchAuxLoss(SumsLoss):
    """Mean over the sequences of sum_i f_i P_i, with f of the whole global batch.

    f_i = E / (K T) * #{t : i selected} over all T tokens of the global batch, and
    P_i = 1 / L * sum_t p(t,i) of each sequence. Source: arXiv 2501.11873, Eqs. 3 and 4; Qwen3 was
    trained with this loss (arXiv 2505.09388). The counts of a step are unknown while its first
    micro-batch runs backward, so f is approximated in one of two ways:

    - ``previous_step``: f is the load of the last optimizer step over all ranks and
      micro-batches. It is constant in a step, the loss is exactly additive, and its gradient
      depends neither on the layout nor on the schedule. In the first step f = 1, whose gradient is
      zero. f is part of the checkpoint.
    - ``running``: f is the load of the running step's micro-batches so far, over the
      data-parallel ranks: the buffer of the paper. It costs one small collective a forward.

    Attributes:
        load_E: f of the last step, float32 ``(E,)``; ``previous_step`` alone.
        counts_E: tokens per expert of this step so far, int64 ``(E,)``; ``running`` alone.
    """

    type_name: ClassVar[str] = "global_batch"
    metric_name: ClassVar[str] = "global_load_balancing_loss"
    linear: ClassVar[bool] = True

    @dataclass(kw_only=True, slots=True)
    class Config(SumsLoss.Config):
        counts: Literal["previous_step", "running"] = "previous_step"
        """Source of f; see the class."""

        def bind(self, **numbers: Any) -> None:
            """Fill in the numbers, and replicate ``load_E``."""
            SumsLoss.Config.bind(self, **numbers)
            if self.counts == "previous_step":
                self.replicate(["load_E"])

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.running = config.counts == "running"
        self._register(device=None)

    counts_E: torch.Tensor
    load_E: torch.Tensor

    def _register(self, device: torch.device | None) -> None:
        if self.running:
            zeros = torch.zeros(self.num_experts, dtype=torch.int64, device=device)
            self.register_buffer("counts_E", zeros, persistent=False)
        else:
            self.register_buffer("load_E", torch.ones(self.num_experts, device=device))

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        self._register(buffer_device or next(self.buffers()).device)

    @property
    def needs_counts(self) -> bool:
        """True with ``running``."""
        return self.running

    @property
    def needs_step_counts(self) -> bool:
        """True with ``previous_step``."""
        return not self.running

    def coefficients(self, sums_BE, counts_BE, sequences) -> torch.Tensor:
        """Return f_i / L, times the share of the sequence."""
        return self._load(counts_BE, sequences).unsqueeze(0) * (sequences.share / sequences.tokens)

    def _load(self, counts_BE: torch.Tensor | None, sequences: Sequences) -> torch.Tensor:
        """Return f ``(E,)``, and add the micro-batch to the running counts."""
        if not self.running:
            return local_shard(self.load_E)
        if not is_recomputation():
            assert counts_BE is not None
            batch_E = (counts_BE * (sequences.share > 0)).sum(dim=0)
            if self.groups.batch.group is not None:
                batch_E = all_reduce(batch_E, "sum", self.groups.batch.group)
            self.counts_E.add_(batch_E)
        return _relative_load(self.counts_E, 1.0)

    @classmethod
    def finish_step(
        cls, losses: Sequence[GlobalBatchAuxLoss], counts_NE: torch.Tensor | None
    ) -> None:
        """Set f of the next step, or reset the running counts."""
        if counts_NE is None:
            torch._foreach_zero_([loss.counts_E for loss in losses])
        else:
            loads = [local_shard(loss.load_E) for loss in losses]
            load_NE = _relative_load(counts_NE, torch.stack(loads))
            torch._foreach_copy_(loads, load_NE.unbind())


def _relative_load(counts: torch.Tensor, otherwise: float | torch.Tensor) -> torch.Tensor:
    """Divide each expert's tokens by the mean over the experts, float32 ``(..., E)``.

    Returns ``otherwise`` if no valid token was counted.
    """
    total = counts.sum(dim=-1, keepdim=True)
    load = counts * counts.shape[-1] / total.clamp_min(1)
    return torch.where(total > 0, load, otherwise).float()

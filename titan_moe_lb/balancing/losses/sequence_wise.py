"""Sequence-wise balance loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from titan_moe_lb.balancing.losses.base import SumsLoss
from titan_moe_lb.errors import JobError


class SequenceWiseAuxLoss(SumsLoss):
    """Mean over the sequences of sum_i f_i P_i; 1.0 at perfect balance.

    Over the L tokens of a sequence, f_i = E / (K L) * #{t : i selected} and
    P_i = 1 / L * sum_t p(t,i). Source: DeepSeek-V3, arXiv 2412.19437, Eqs. 17 to 20; the
    expert-level loss of DeepSeek-V2, arXiv 2405.04434, Eqs. 23 to 25.
    """

    type_name: ClassVar[str] = "sequence_wise"
    metric_name: ClassVar[str] = "seq_load_balancing_loss"
    linear: ClassVar[bool] = True

    @dataclass(kw_only=True, slots=True)
    class Config(SumsLoss.Config):
        over: Literal["row", "document"] = "row"
        """Sequence of the loss: a row of the batch, or each document packed into it. A document is
        weighted by its number of tokens."""

        max_documents: int = 64
        """Largest number of documents in a row; later ones are merged into the last."""

        @property
        def documents(self) -> int | None:
            """Largest number of documents in a row; None with ``over = "row"``."""
            return self.max_documents if self.over == "document" else None

        def __post_init__(self) -> None:
            SumsLoss.Config.__post_init__(self)
            if self.max_documents < 1:
                raise JobError(
                    f"sequence_wise max_documents is {self.max_documents}; it must be at least 1"
                )

    def coefficients(self, sums_BE, counts_BE, sequences) -> torch.Tensor:
        """Return f_i / L, times the share of the sequence."""
        scale = self.num_experts / self.top_k
        return counts_BE * (scale * sequences.share / sequences.tokens**2)

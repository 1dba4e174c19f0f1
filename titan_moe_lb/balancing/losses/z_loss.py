"""Router z-loss."""

from __future__ import annotations

from typing import ClassVar

import torch

from titan_moe_lb.balancing.losses.base import LogitsLoss


class RouterZLoss(LogitsLoss):
    """Mean over the tokens of (log sum_i exp logits(t,i))**2: it keeps the gate's logits small.

    Source: ST-MoE, arXiv 2202.08906, Eq. 5.
    """

    type_name: ClassVar[str] = "z_loss"
    metric_name: ClassVar[str] = "z_loss"

    def per_token(self, logits_BLE: torch.Tensor) -> torch.Tensor:
        """Return the squared logsumexp of the logits."""
        return torch.logsumexp(logits_BLE, dim=-1).square()

    def per_token_and_saved(self, logits_BLE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the squared logsumexp, and the logsumexp."""
        logsumexp_BL = torch.logsumexp(logits_BLE, dim=-1)
        return logsumexp_BL.square(), logsumexp_BL

    def add_gradient(self, grad_BLE, logits_BLE, saved, weight, scale) -> torch.Tensor:
        """Add 2 logsumexp(logits) softmax(logits)."""
        logsumexp_BL1 = saved.unsqueeze(-1)
        softmax_BLE = (logits_BLE - logsumexp_BL1).exp_()
        factor_BL1 = logsumexp_BL1 * weight
        # Nothing else needs the memory of the softmax. A compiler plans it itself.
        is_plain = not (torch.compiler.is_compiling() or torch.is_grad_enabled())
        out = softmax_BLE if is_plain else None
        return torch.addcmul(grad_BLE, softmax_BLE, factor_BL1, value=2 * scale, out=out)

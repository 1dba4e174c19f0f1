"""MoE layers of the tiny DeepSeek-V3 as a model, their choices, and the sign rule by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from model_registry.deepseek_v3 import model_registry
from titan_moe_lb.balancing.expert_bias import ExpertBias, SignBias
from titan_moe_lb.balancing.losses import AuxLoss
from titan_moe_lb.balancing.router import LoadBalancedRouter
from titan_moe_lb.errors import JobError
from titan_moe_lb.own_loop.attach import attach
from titan_moe_lb.own_loop.balance import Balance

SPEED = 1e-2
SIGN = SignBias.Config(speed=SPEED)


def spec_of(
    losses: list[AuxLoss.Config],
    rule: ExpertBias.Config | None,
    change: Callable[[LoadBalancedRouter.Config], None],
) -> Any:
    """Build the spec.

    Args:
        change: change of the config of each router.
    """
    spec = model_registry("tiny", aux_losses=losses, expert_bias=rule)
    for _fqn, router, *_ in spec.model.traverse(LoadBalancedRouter.Config):
        change(router)
    return spec


class MoELayers(nn.Module):
    """Model of MoE layers that records its choices; its input stands for tokens.

    Attributes:
        chosen, scores: experts of every token and all their scores, by layer, of each forward.
        run: calls a layer, as a checkpoint would.
    """

    def __init__(
        self,
        losses: list[AuxLoss.Config] | None = None,
        rule: ExpertBias.Config | None = SIGN,
        change: Callable[[LoadBalancedRouter.Config], None] = lambda router: None,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        # Of the whole model, as a user builds one; without its attention.
        whole = spec_of(losses or [], rule, change).model.build()
        self.layers = nn.ModuleDict(
            {name: block.moe for name, block in whole.layers.items() if hasattr(block, "moe")}
        )
        self.chosen: dict[str, list[np.ndarray]] = {name: [] for name in self.layers}
        self.scores: dict[str, list[np.ndarray]] = {name: [] for name in self.layers}
        self.run: Callable[[nn.Module, torch.Tensor], torch.Tensor] = lambda layer, x: layer(x)
        for name, layer in self.layers.items():
            with torch.no_grad():
                layer.init_states(buffer_device=torch.device("cpu"))

            def note(_router, _inputs, output, name=name):
                self.chosen[name].append(output[1].numpy().copy())
                self.scores[name].append(output[2].detach().float().numpy().copy())

            layer.router.register_forward_hook(note)

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x_BLD = x_BLD + self.run(layer, x_BLD)
        return x_BLD

    @property
    def biases(self) -> dict[str, np.ndarray | None]:
        return {
            name: None if layer.expert_bias_E is None else layer.expert_bias_E.double().numpy()
            for name, layer in self.layers.items()
        }


class Loop:
    """Model with optimizer and balance; it follows the sign rule by hand."""

    def __init__(self, model: MoELayers | None = None, **arguments: Any) -> None:
        self.model = model or MoELayers()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        self.balance: Balance = attach(self.model, self.optimizer, **arguments)
        self.by_hand = self.model.biases

    def forward_and_backward(self, seed: int = 0, rows: int = 2) -> None:
        parameter = next(self.model.parameters())
        generator = torch.Generator().manual_seed(seed)
        x_BLD = torch.randn(rows, 8, 64, generator=generator).to(parameter.dtype)
        self.model(x_BLD.requires_grad_()).float().square().mean().backward()

    def step(self, seed: int = 0) -> None:
        """Train a step of one micro-batch, and move the bias by hand too."""
        for chosen in self.model.chosen.values():
            chosen.clear()
        self.forward_and_backward(seed)
        for name, chosen in self.model.chosen.items():
            counts_E = np.bincount(chosen[0].ravel(), minlength=8)
            signs_E = np.sign(counts_E.mean() - counts_E)
            self.by_hand[name] = self.by_hand[name] + SPEED * (signs_E - signs_E.mean())
        self.optimizer.step()

    def assert_right(self) -> None:
        """Check the biases against those by hand, in float32, and the counts of the last step."""
        for name, bias_E in self.model.biases.items():
            assert self.model.layers[name].expert_bias_E.dtype == torch.float32
            np.testing.assert_allclose(bias_E, self.by_hand[name], rtol=0, atol=1e-6)
        counted = [
            np.bincount(chosen[0].ravel(), minlength=8).tolist()
            for chosen in self.model.chosen.values()
        ]
        assert self.balance.load().counts_ME.tolist() == counted
        assert np.isfinite(list(self.balance.metrics().values())).all()


def error_of(do: Callable[[], Any]) -> str | None:
    """Return the message of the ``JobError`` that ``do`` raises; None without one."""
    try:
        do()
    except JobError as error:
        return str(error)
    return None

"""Models and loops whose balancing does not act: one fault each, as people meet it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from model_registry.deepseek_v3 import model_registry
from tests.support.own_loop_jobs import forward, initialised
from titan_moe_lb.balancing.expert_bias import FrozenBias, SignBias
from titan_moe_lb.balancing.freezing import Freeze
from titan_moe_lb.balancing.losses import RouterZLoss, SequenceWiseAuxLoss
from titan_moe_lb.balancing.router import moe_layers_of
from titan_moe_lb.balancing.self_test.result import SelfTest
from titan_moe_lb.own_loop.attach import attach
from titan_moe_lb.own_loop.balance import Balance


@dataclass
class Loop:
    """Model, optimizer and batch of a loop with its balance."""

    model: nn.Module
    optimizer: Any
    balance: Balance
    step: Callable[[], None]
    """One forward and backward."""

    def check(self) -> SelfTest:
        return self.balance.check(self.step, self.optimizer)


def loop(
    change_model: Callable[[nn.Module], None] = lambda model: None,
    optimizer_of: Callable[[nn.Module], Any] | None = None,
    change: Callable[[Loop], None] = lambda loop: None,
    change_config: Callable[[Any], None] = lambda config: None,
    **balance: Any,
) -> Loop:
    """Build a loop of the tiny DeepSeek-V3.

    Args:
        change_model: change of the model before ``attach``.
        optimizer_of: optimizer of the model; default: AdamW.
        change: change of the loop after ``attach``.
        change_config: change of the model's config.
        balance: arguments of the registry entry.
    """
    arguments: dict[str, Any] = {
        "aux_losses": [SequenceWiseAuxLoss.Config(weight=1e-3), RouterZLoss.Config(weight=1e-4)],
        "expert_bias": SignBias.Config(speed=1e-3),
    }
    spec = model_registry("tiny", **arguments | balance)
    change_config(spec.model)
    model = initialised(spec)
    change_model(model)
    tokens = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        logits = forward(model, tokens)[:, :-1].flatten(0, 1).float()
        F.cross_entropy(logits, tokens[:, 1:].flatten()).backward()

    optimizer = (optimizer_of or (lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3)))(model)
    made = Loop(model, optimizer, attach(model, optimizer), step)
    change(made)
    return made


def gates(model: nn.Module) -> list[nn.Module]:
    return [layer.router.gate for layer in moe_layers_of([model])]


def of_gates(model: nn.Module) -> set[int]:
    return {id(parameter) for gate in gates(model) for parameter in gate.parameters()}


def wrap_gates(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        for gate in gates(model):
            own = gate.forward
            gate.forward = lambda x, own=own: function(own(x))

    return change


class Discarded(RouterZLoss):
    """Loss whose gradient is attached to a tensor that nobody uses (NeMo Automodel #1408)."""

    type_name: ClassVar[str] = "discarded"
    metric_name: ClassVar[str] = "discarded_loss"

    @dataclass(kw_only=True, slots=True)
    class Config(RouterZLoss.Config):
        pass

    def attach(self, logits_BLE, tokens, record):
        super().attach(logits_BLE, tokens, record)
        return logits_BLE


def freeze_by_hand(model: nn.Module) -> None:
    for gate in gates(model):
        gate.requires_grad_(False)


def learn_again(model: nn.Module) -> None:
    model.requires_grad_(True)


def cast_bias(made: Loop) -> None:
    for layer in moe_layers_of([made.model]):
        layer.expert_bias_E = layer.expert_bias_E.bfloat16()


def forget_bias(made: Loop) -> None:
    for layer in moe_layers_of([made.model]):
        own = layer.router.forward
        layer.router.forward = lambda x, _bias=None, own=own: own(x)


def one_sided_bias(made: Loop) -> None:
    for layer in moe_layers_of([made.model]):
        layer.expert_bias_E[::2] = 5.0
        layer.expert_bias_E[4:] = 0.0


def without_gates(model: nn.Module) -> torch.optim.Optimizer:
    known = of_gates(model)
    return torch.optim.AdamW([p for p in model.parameters() if id(p) not in known], lr=1e-3)


def still_gates(model: nn.Module) -> torch.optim.Optimizer:
    known = of_gates(model)
    groups = [[], []]
    for parameter in model.parameters():
        groups[id(parameter) in known].append(parameter)
    return torch.optim.SGD([{"params": groups[0], "lr": 0.1}, {"params": groups[1], "lr": 0.0}])


def other_optimizer(made: Loop) -> None:
    made.optimizer = torch.optim.AdamW(made.model.parameters(), lr=1e-3)


def second_update(made: Loop) -> None:
    """torchtitan's own hook, beside ours."""

    def move(*_: Any) -> None:
        for layer in moe_layers_of([made.model]):
            layer.expert_bias_E.add_(1e-3 * torch.arange(8))

    made.optimizer.register_step_pre_hook(move)


def evaluate(made: Loop) -> None:
    made.model.eval()


def choose_one(config: Any) -> None:
    """The score of the only chosen expert is divided by itself."""
    for layer in config.layers:
        if getattr(layer, "moe", None) is not None:
            router = layer.moe.router
            router.top_k = layer.moe.routed_experts.token_dispatcher.top_k = 1
            router.route_norm = True
            router.bind()


LOSS = SequenceWiseAuxLoss.Config
FAULTS: dict[str, tuple[Callable[[], Loop], str, str]] = {
    "a detached gate": (
        lambda: loop(wrap_gates(torch.Tensor.detach)),
        "no_gradient_of_model",
        "gate",
    ),
    "a loss whose result is discarded (Automodel #1408)": (
        lambda: loop(aux_losses=[Discarded.Config(weight=1e-3), LOSS(weight=1e-4)]),
        "loss_without_gradient",
        "discarded",
    ),
    "a double softmax (transformers #45111)": (
        lambda: loop(wrap_gates(lambda logits: logits.softmax(-1)), score_func="softmax"),
        "scored_twice",
        "gate",
    ),
    "a weight of 1e-12": (
        lambda: loop(aux_losses=[LOSS(weight=1e-12)]),
        "loss_too_weak",
        "sequence_wise",
    ),
    "a weight of 1000": (
        lambda: loop(aux_losses=[LOSS(weight=1e3)]),
        "loss_too_strong",
        "sequence_wise",
    ),
    "a loss on a frozen gate": (lambda: loop(freeze_by_hand), "loss_on_frozen_gate", "gate"),
    "a bias in bfloat16 (Megatron-LM #1482)": (
        lambda: loop(change=cast_bias),
        "wrong_dtype",
        "bias",
    ),
    "a bias that the router does not read": (
        lambda: loop(change=forget_bias),
        "bias_not_read",
        "bias",
    ),
    "a speed of 1e-9": (
        lambda: loop(expert_bias=SignBias.Config(speed=1e-9)),
        "bias_cannot_reach",
        "bias",
    ),
    "a bias above all scores": (lambda: loop(change=one_sided_bias), "bias_chooses_alone", "bias"),
    "gates outside of the optimizer": (
        lambda: loop(optimizer_of=without_gates),
        "gate_outside_optimizer",
        "gate",
    ),
    "a learning rate of 0 for the gates": (
        lambda: loop(optimizer_of=still_gates),
        "gate_without_learning_rate",
        "gate",
    ),
    "another optimizer than attach() got": (
        lambda: loop(change=other_optimizer),
        "step_not_closed",
        "step",
    ),
    "a frozen gate that learns again": (
        lambda: loop(learn_again, freeze=Freeze(gate="all")),
        "frozen_gate_learns",
        "gate",
    ),
    "a frozen bias that another hook moves": (
        lambda: loop(change=second_update, expert_bias=FrozenBias.Config()),
        "bias_written_by_others",
        "bias",
    ),
    "two updates of one bias": (
        lambda: loop(change=second_update),
        "bias_written_by_others",
        "bias",
    ),
    "a model in eval()": (lambda: loop(change=evaluate), "no_forward_counted", "step"),
    "one expert with weight 1 (mixture-of-experts #27)": (
        lambda: loop(change_config=choose_one),
        "no_gradient_of_model",
        "gate",
    ),
}
"""Name to the loop, and to the kind and the part of the fault that is named first."""

"""Faults of a balancing that does not act: one function a fault.

A function yields the layers with the fault, what is wrong, and what to do. :data:`FAULTS` lists the
functions; a cause comes before its consequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from titan_moe_lb.balancing.self_test.measured import LayerMeasured, LossMeasured, ModelMeasured

STEPS = 10_000
"""Equal updates of a bias after which its effect is judged."""
FEW = 0.01
"""Share of the choices that this many updates have to change."""
WEAK = 1e-5
"""Share of the model's gradient below which a loss does nothing; as in ``diagnose``."""
UNEVEN = 0.1
"""MaxVio below which a bias has nothing to do."""
STRONG = 100
"""Share above which a loss leaves nothing to the model. Before training, a gradient of the model is
small."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault."""

    kind: str
    """Name of the function that found it."""
    layer: int | None
    """Number of the layer; None for the step as a whole."""
    part: str
    """Loss by ``type_name``, ``"bias"``, ``"gate"`` or ``"step"``."""
    what: str
    remedy: str


Found = Iterator[tuple[LayerMeasured | None, str, str, str]]


def step_not_closed(model: ModelMeasured) -> Found:
    """Find an optimizer whose step closes no step of the balance, or several."""
    if model.closed_steps == 0:
        yield (
            None,
            "step",
            "optimizer.step() closes no step of the balance, so that counts and biases stand still",
            "pass the optimizer that the loop steps to attach(), or call close_step() before it",
        )
    elif model.closed_steps and model.closed_steps > 1:
        yield (
            None,
            "step",
            f"the optimizers' step() closes {model.closed_steps} steps of the balance",
            "pass one optimizer, or all in one sequence, to one attach()",
        )


def no_forward_counted(model: ModelMeasured) -> Found:
    """Find a forward that does not learn."""
    if model.counted_forwards == 0:
        yield (
            None,
            "step",
            "no forward was counted: the model is in eval(), under no_grad(), or another one ran",
            "call train() on the model that attach() was given, and run it with gradients",
        )


def wrong_dtype(model: ModelMeasured) -> Found:
    """Find a state of the balance that is not float32."""
    for layer in model.layers:
        if layer.wrong_dtypes:
            yield (
                layer,
                "bias",
                f"{', '.join(layer.wrong_dtypes)} loses small updates",
                "load and assign it as float32",
            )
    if model.counted_forwards is None and not any(layer.wrong_dtypes for layer in model.layers):
        yield (
            None,
            "step",
            "a state of the balance on another rank is not float32, so that no forward ran",
            "look at the result of the other ranks",
        )


def gate_outside_optimizer(model: ModelMeasured) -> Found:
    """Find a gate that no optimizer steps."""
    for layer in model.layers:
        if layer.in_optimizer is False:
            yield layer, "gate", "the gate is in no optimizer", "add its parameters to a group"


def gate_without_learning_rate(model: ModelMeasured) -> Found:
    """Find a gate with learning rate 0."""
    for layer in model.layers:
        if layer.learning_rate == 0:
            yield (
                layer,
                "gate",
                "the learning rate of the gate is 0",
                "give its group one, or freeze it by freeze = Freeze(gate=...)",
            )


def frozen_gate_learns(model: ModelMeasured) -> Found:
    """Find a gate that is frozen by name and requires gradients."""
    for layer in model.layers:
        if "gate" in layer.frozen and layer.gate_learns:
            yield (
                layer,
                "gate",
                "freeze names the gate, and its weights learn",
                "remove the requires_grad_() that comes after the freezing",
            )


def loss_on_frozen_gate(model: ModelMeasured) -> Found:
    """Find losses of a gate that was frozen by hand."""
    for layer in model.layers:
        if layer.losses and not layer.gate_learns and "losses" not in layer.frozen:
            yield (
                layer,
                "gate",
                "the gate is frozen and its losses are on, which then change the layers before it",
                "freeze it by freeze = Freeze(gate=...), which turns its losses off",
            )


def scored_twice(model: ModelMeasured) -> Found:
    """Find a gate that returns scores, to which the router applies its score function again."""
    for layer in model.layers:
        if layer.gate_output is not None and layer.gate_output.looks_scored:
            yield (
                layer,
                "gate",
                "the gate returns scores between 0 and 1, and the router scores them again",
                "return logits from the gate: a second softmax makes all experts nearly equal",
            )


def no_gradient_of_model(model: ModelMeasured) -> Found:
    """Find a gate that the model's own loss does not reach."""
    for layer in model.layers:
        if layer.main_norm or not layer.gate_learns or not model.counted_forwards:
            continue
        if layer.gate_output is not None and not layer.gate_output.attached:
            what, remedy = "the output of the gate is detached", "compute it with gradients"
        else:
            what = "the model's own loss has no gradient at the gate"
            remedy = (
                "do not detach the scores; with top_k = 1 leave route_norm out, which makes them 1"
            )
        yield layer, "gate", what, remedy


def loss_without_gradient(model: ModelMeasured) -> Found:
    """Find a loss that does not reach its gate."""
    for layer, loss in _losses_on(model):
        if loss.reaches or (layer.gate_output is not None and not layer.gate_output.attached):
            continue
        if not loss.weight:
            what, remedy = "its weight is 0 in this step", "look at its changes"
        else:
            what = "its gradient does not reach the gate"
            remedy = "its value is computed and its gradient dropped: return what attach() returns"
        yield layer, loss.name, what, remedy


def loss_too_weak(model: ModelMeasured) -> Found:
    """Find a loss that vanishes beside the model's gradient."""
    for layer, loss in _losses_on(model):
        if loss.reaches and loss.share < WEAK:
            yield (
                layer,
                loss.name,
                f"its gradient is {loss.share:.1g} of the model's, below {WEAK:g}",
                f"weight = {loss.weight * 0.01 / loss.share:.1g} makes it about 0.01",
            )


def loss_too_strong(model: ModelMeasured) -> Found:
    """Find a loss beside which the model's gradient vanishes."""
    for layer, loss in _losses_on(model):
        if layer.main_norm and loss.share > STRONG:
            yield (
                layer,
                loss.name,
                f"its gradient is {loss.share:.1g} times the model's, above {STRONG}",
                f"weight = {loss.weight / loss.share:.1g} makes them equal",
            )


def bias_written_by_others(model: ModelMeasured) -> Found:
    """Find a bias that changes by something else than its rule."""
    for layer in model.layers:
        bias = layer.bias
        if bias is not None and bias.foreign > 1e-6 * (1 + bias.delta):
            frozen = "" if bias.moves else ", although it is frozen"
            yield (
                layer,
                "bias",
                f"something besides the rule {bias.rule} changes it by {bias.foreign:.1g}{frozen}",
                "remove the other update, such as torchtitan's own hook",
            )


def bias_stands_still(model: ModelMeasured) -> Found:
    """Find a bias that its rule does not move although the load is uneven."""
    for layer in model.layers:
        bias = layer.bias
        if bias is not None and bias.moves and not bias.delta and layer.uneven > UNEVEN:
            yield layer, "bias", f"the rule {bias.rule} does not move it", "look at its changes"


def bias_not_read(model: ModelMeasured) -> Found:
    """Find a bias that the choice does not follow."""
    for layer in model.layers:
        if layer.bias is not None and not layer.bias.reads:
            yield (
                layer,
                "bias",
                "the choice does not read it: an expert with a bias above all scores is not chosen",
                "pass expert_bias_E to the router, and leave forced routing and replays out",
            )


def bias_cannot_reach(model: ModelMeasured) -> Found:
    """Find a bias whose updates are too small to change choices."""
    for layer in model.layers:
        bias = layer.bias
        if bias is None or not bias.moves or not bias.delta or not bias.reads:
            continue
        if bias.moved_share < FEW and layer.uneven > UNEVEN and not bias.chooses_alone:
            yield (
                layer,
                "bias",
                f"{STEPS:,} steps of {bias.delta:.1g} change {bias.moved_share:.1%} of the choices",
                "a larger speed, or a rule without one: quantile",
            )


def bias_chooses_alone(model: ModelMeasured) -> Found:
    """Find a bias that outweighs every score."""
    for layer in model.layers:
        if layer.bias is not None and layer.bias.chooses_alone:
            yield (
                layer,
                "bias",
                "it outweighs the scores: all tokens choose the same experts, and do not without it",
                "start it anew: reset = true",
            )


FAULTS: tuple[Callable[[ModelMeasured], Found], ...] = (
    wrong_dtype,
    no_forward_counted,
    step_not_closed,
    gate_outside_optimizer,
    gate_without_learning_rate,
    frozen_gate_learns,
    loss_on_frozen_gate,
    scored_twice,
    no_gradient_of_model,
    loss_without_gradient,
    loss_too_weak,
    loss_too_strong,
    bias_written_by_others,
    bias_stands_still,
    bias_not_read,
    bias_cannot_reach,
    bias_chooses_alone,
)
"""All faults, in the order of their listing."""


def faults_of(model: ModelMeasured) -> list[Fault]:
    """Return the faults of a measured model."""
    return [
        Fault(
            kind=look.__name__,
            layer=None if layer is None else layer.layer,
            part=part,
            what=what,
            remedy=remedy,
        )
        for look in FAULTS
        for layer, part, what, remedy in look(model)
    ]


def _losses_on(model: ModelMeasured) -> Iterator[tuple[LayerMeasured, LossMeasured]]:
    """Iterate over the losses that should act on a gate."""
    if not model.counted_forwards:
        return
    for layer in model.layers:
        if layer.gate_learns and not layer.evens_out and "losses" not in layer.frozen:
            for loss in layer.losses:
                yield layer, loss

"""Measurements of a self-test."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(kw_only=True)
class GateOutput:
    """Output of a gate in one forward."""

    attached: bool
    """True if gradients flow back through it."""

    looks_scored: bool
    """True if all outputs lie between 0 and 1, as those of a score function and not of a gate."""


@dataclass(kw_only=True)
class LossMeasured:
    """One loss of a layer."""

    name: str
    """``type_name`` of the loss."""

    weight: float
    """Weight in the step."""

    norm: float
    """Norm of the weighted gradient at the gate."""

    share: float
    """Norm over that of the model's own gradient; inf if the model has none."""

    reaches: bool
    """True if the gradient is above the noise between two equal forwards."""


@dataclass(kw_only=True)
class BiasMeasured:
    """Expert bias of a layer."""

    rule: str
    """``type_name`` of the rule."""

    moves: bool
    """True if the rule changes the bias."""

    delta: float
    """Largest update of the rule in one step."""

    foreign: float
    """Largest change in the step that is not the rule's."""

    reads: bool
    """True if every token chooses an expert whose bias exceeds all scores."""

    moved_share: float
    """Share of the choices that change after ``STEPS`` equal updates."""

    chooses_alone: bool
    """True if all tokens choose the same experts, and do not without the bias."""


@dataclass(kw_only=True)
class LayerMeasured:
    """One router, and the state of its gate."""

    layer: int
    frozen: frozenset[str]
    """Parts that the config freezes."""

    gate_learns: bool
    """True if a parameter of the gate requires gradients."""

    in_optimizer: bool | None
    """True if every parameter of the gate that learns is in an optimizer; None without one."""

    learning_rate: float | None
    """Largest initial learning rate of the gate; None if it is in no optimizer."""

    wrong_dtypes: list[str] = field(default_factory=list)
    """Buffers of the balance that are not float32."""

    gate_output: GateOutput | None = None
    """None if the gate was compiled, so that its output was not seen."""

    main_norm: float = 0.0
    """Norm of the gradient of the model's own loss at the gate. 0 where route_norm makes the only
    score of a token 1, of which rounding leaves a gradient."""

    evens_out: bool = False
    """True if every token chooses every expert."""

    losses: list[LossMeasured] = field(default_factory=list)
    bias: BiasMeasured | None = None
    uneven: float = 0.0
    """MaxVio of the forward."""


@dataclass(kw_only=True)
class ModelMeasured:
    """All layers of a rank, and the step as a whole."""

    layers: list[LayerMeasured]
    counted_forwards: int | None = None
    """Forwards of the given function that learned; None if it did not run, as with a wrong dtype."""

    closed_steps: int | None = None
    """Steps of the balance that ``optimizer.step()`` closed; None without an optimizer."""


def max_violation(counts_E: torch.Tensor) -> float:
    """Compute MaxVio of the tokens of each expert."""
    return float(counts_E.max() * len(counts_E) / counts_E.sum().clamp_min(1)) - 1

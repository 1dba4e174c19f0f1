"""Base classes of the bias rules, and of those with an update speed.

Shape suffixes: N = layers of a rank, E = experts, H = bins of a histogram; B = rows and
L = tokens of a row on a rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from titan_moe_lb.balancing.component import Component, require_formula
from titan_moe_lb.balancing.value_schedule import Change, check_changes, value_at
from titan_moe_lb.errors import JobError


@dataclass(frozen=True, slots=True)
class BiasStep:
    """Sums of a finished step for a bias rule: valid tokens of all ranks and micro-batches."""

    bias_NE: torch.Tensor
    """Biases during the step, float32."""

    counts_NE: torch.Tensor
    """Tokens that selected each expert, int64."""

    histogram_NEH: torch.Tensor | None = None
    """Sums of :meth:`ExpertBias.observe`, int32; None without bins. It is reset after the update."""

    state: dict[str, torch.Tensor] = field(default_factory=dict)
    """State by the names of ``state_names``, float32 ``(N, E)``; the rule changes it in place."""

    choices_N1: torch.Tensor = field(init=False)
    """Sum of the counts, int64: tokens times K, or 0 if no token was routed."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices_N1", self.counts_NE.sum(dim=-1, keepdim=True))


class ExpertBias(Component):
    """Base class of rules for the bias ``b_i`` that is added to an expert's scores for the choice.

    The bias is torchtitan's buffer ``expert_bias_E`` of each MoE layer. It is float32 and part of
    the checkpoint; a rule updates it just before the optimizer steps. Each layer has its own
    component, and the first of similar layers updates the stacked biases of all. A user's rule is
    a subclass with a ``type_name``.
    """

    kinds: ClassVar[dict[str, type[ExpertBias]]] = {}
    """Configurable rules, by ``type_name``."""

    filled_by_job: ClassVar[frozenset[str]] = frozenset(
        {"num_experts", "top_k", "score_func", "starts_anew"}
    )
    """Fields of the Config that :meth:`Config.bind` and the model's ``update_from_config`` fill."""

    moves: ClassVar[bool] = True
    """True if the rule changes the bias, and so needs the counts of every step."""

    state_names: ClassVar[tuple[str, ...]] = ()
    """Buffers of the rule's own state for each expert; part of the checkpoint."""

    @dataclass(kw_only=True, slots=True)
    class Config(Component.Config):
        reset: bool = False
        """Start from a zero bias if the job begins from a checkpoint with a learned bias. A restart
        of the same job keeps the bias learned since."""

        changes: list[Change] = field(default_factory=list)
        """Changes of the update speed during training."""

        num_experts: int | None = None
        """E of the router. Filled by :meth:`bind`."""

        top_k: int | None = None
        """K of the router. Filled by :meth:`bind`."""

        score_func: str = "sigmoid"
        """Score function of the router. Filled by the router's Config."""

        starts_anew: bool = False
        """True if the checkpoint lacks the state of the rule, because another rule wrote it. Filled
        by ``update_from_config`` of the model."""

        def bind(self, *, num_experts: int, top_k: int) -> None:
            """Fill in the numbers of the router."""
            self.num_experts, self.top_k = num_experts, top_k
            if self._owner.state_names:
                self.replicate(self._owner.state_names)

    def __init__(self, config: Config) -> None:
        super().__init__()
        if self.moves:
            require_formula("expert bias", type(self), ExpertBias, "delta")
        self.config = config
        self._register(device=None)

    def _register(self, device: torch.device | None) -> None:
        for name in self.state_names:
            assert self.config.num_experts is not None
            zeros = torch.zeros(self.config.num_experts, dtype=torch.float32, device=device)
            self.register_buffer(name, zeros, persistent=not self.config.starts_anew)

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        for buffer in self.buffers():
            self._register(buffer_device or buffer.device)
            break

    @property
    def num_bins(self) -> int:
        """Number of histogram bins of each expert, H; 0 if the rule needs no histogram."""
        return 0

    def set_progress(self, step: int, tokens: int) -> None:
        """Set the scheduled values, on the host, before the bias is updated.

        Args:
            step: number of the optimizer step that ends, from 1.
            tokens: tokens of the global batches of the steps before it.
        """

    def observe(
        self,
        histogram_EH: torch.Tensor,
        required_BLE: torch.Tensor,
        bias_E: torch.Tensor,
        number: torch.Tensor,
    ) -> None:
        """Add a forward to the histogram of the step.

        Only forwards in training are observed, and each only once, even if it is recomputed.

        Args:
            histogram_EH: int32, changed in place.
            required_BLE: bias above which each token selects each expert, float32
                (:func:`titan_moe_lb.balancing.expert_bias.required.required_bias`); -inf if it
                selects the expert at any bias.
            bias_E: bias in the forward, float32.
            number: int32: 1 for a valid token and 0 for padding ``(B, L, 1)``, or 1 for all.
        """

    def move(self, step: BiasStep) -> torch.Tensor:
        """Compute :meth:`delta`, and leave layers without tokens unchanged.

        A layer that routed no token keeps its bias and its state, whatever the formula returns for
        zero counts.

        Returns:
            float32 ``(N, E)``.
        """
        before = {name: state_NE.clone() for name, state_NE in step.state.items()}
        empty_N1 = step.choices_N1 == 0
        delta_NE = self.delta(step).masked_fill(empty_N1, 0)
        for name, state_NE in before.items():
            step.state[name] = torch.where(empty_N1, state_NE, step.state[name])
        return delta_NE

    def delta(self, step: BiasStep) -> torch.Tensor:
        """Compute the update of the biases of N layers after a step.

        The update of a layer that routed no token is discarded.

        Returns:
            float32 ``(N, E)``.
        """
        raise NotImplementedError


class SpeedBias(ExpertBias):
    """Base class of rules whose updates are proportional to a speed, which can follow a schedule.

    Attributes:
        speed: speed in the step that is about to end.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ExpertBias.Config):
        speed: float
        """Factor of every update of the bias; ``changes`` can change it."""

        def __post_init__(self) -> None:
            if not (math.isfinite(self.speed) and self.speed > 0):
                raise JobError(
                    f"expert_bias speed is {self.speed}; it must be a finite number above 0 "
                    '(to keep the bias unchanged set type = "frozen"; for no bias, expert_bias = "none")'
                )
            check_changes("expert_bias", self.changes)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.speed = config.speed

    def set_progress(self, step: int, tokens: int) -> None:
        """Set the speed of the step."""
        self.speed = value_at(self.config.speed, self.config.changes, step, tokens)

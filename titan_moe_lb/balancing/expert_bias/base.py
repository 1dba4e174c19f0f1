"""Base class of the rules of the expert bias.

Shape suffixes: N = layers of a rank, E = experts, H = bins of a histogram; B = rows and
L = tokens of a row on a rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from titan_moe_lb.balancing.component import Component, require_formula
from titan_moe_lb.balancing.value_schedule import Change


@dataclass(frozen=True, slots=True)
class BiasStep:
    """Valid tokens of a finished step over all ranks and micro-batches, as rules read them."""

    bias_NE: torch.Tensor
    """Biases of the step, float32."""

    counts_NE: torch.Tensor
    """Tokens that selected each expert, int64."""

    histogram_NEH: torch.Tensor | None = None
    """Sums of :meth:`ExpertBias.observe`, int64; None without bins."""

    state: dict[str, torch.Tensor] = field(default_factory=dict)
    """By name of ``state_names``: float32 ``(N, E)``, which the rule changes in place."""

    choices_N1: torch.Tensor = field(init=False)
    """Sum of the counts, int64: tokens times K, and 0 where nothing was routed."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices_N1", self.counts_NE.sum(dim=-1, keepdim=True))


class ExpertBias(Component):
    """Moves the bias ``b_i`` that is added to the scores of an expert for the choice alone.

    The bias is torchtitan's buffer ``expert_bias_E`` of each MoE layer, float32 and part
    of the checkpoint; a rule moves it when the optimizer steps. Every layer has
    a component of its own, and the first of a rank moves the biases of all its layers at
    once, stacked. A rule of one's own is a subclass with a ``type_name``.
    """

    kinds: ClassVar[dict[str, type[ExpertBias]]] = {}
    """Every rule that can be configured, by ``type_name``."""

    filled_by_job: ClassVar[frozenset[str]] = frozenset({"num_experts", "top_k", "starts_anew"})
    """Fields of the Config that :meth:`Config.bind` and the model's ``update_from_config`` fill."""

    moves: ClassVar[bool] = True
    """Whether the rule ever changes the bias, so that it needs the counts of every step."""

    state_names: ClassVar[tuple[str, ...]] = ()
    """State of the rule for each expert besides the bias; part of the checkpoint."""

    @dataclass(kw_only=True, slots=True)
    class Config(Component.Config):
        reset: bool = False
        """Start from a bias of zero where the job begins from a checkpoint with a learned
        one. Once: a restart of the same job goes on with what it has learned since."""

        changes: list[Change] = field(default_factory=list)
        """When the value that the rule is tuned by changes, and to what."""

        num_experts: int | None = None
        """E of the router. Filled by :meth:`bind`."""

        top_k: int | None = None
        """K of the router. Filled by :meth:`bind`."""

        starts_anew: bool = False
        """The checkpoint lacks the state of the rule, because another rule wrote it. Filled by
        ``update_from_config`` of the model."""

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
        """H of the histogram of each expert that the rule needs; 0 for none."""
        return 0

    def set_progress(self, step: int, tokens: int) -> None:
        """Set the values of the schedule. On the host, before the bias is moved.

        Args:
            step: the optimizer step that is about to end, from 1.
            tokens: tokens of the global batches of the steps before it.
        """

    def observe(
        self,
        histogram_EH: torch.Tensor,
        required_BLE: torch.Tensor,
        bias_E: torch.Tensor,
        number: torch.Tensor,
    ) -> None:
        """Add a forward to the histogram of the step; in training alone, and once however
        often the forward is repeated.

        Args:
            histogram_EH: int32, to be added to in place.
            required_BLE: the bias that each token requires of each expert, float32
                (:func:`titan_moe_lb.balancing.expert_bias.required.required_bias`); -inf where it
                selects the expert whatever its bias.
            bias_E: that of the forward, float32.
            number: int32, 1 for a valid token and 0 for padding ``(B, L, 1)``, or 1 for all.
        """

    def move(self, step: BiasStep) -> torch.Tensor:
        """:meth:`delta` of the layers that have routed a token. A layer without one keeps its bias
        and its state, whatever the formula makes of zero counts."""
        before = {name: state_NE.clone() for name, state_NE in step.state.items()}
        empty_N1 = step.choices_N1 == 0
        delta_NE = self.delta(step).masked_fill(empty_N1, 0)
        for name, state_NE in before.items():
            step.state[name] = torch.where(empty_N1, state_NE, step.state[name])
        return delta_NE

    def delta(self, step: BiasStep) -> torch.Tensor:
        """Formula of the update of the biases of N layers after a step. The update of a layer that
        has routed nothing is not used.

        Returns:
            float32 ``(N, E)``.
        """
        raise NotImplementedError

"""What every rule of the expert bias shares."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torchtitan.protocols.module import Module

from titan_moe_lb.value_schedule import Change


class ExpertBias(Module):
    """Moves the bias ``b_i`` that is added to the scores of an expert for the choice alone.

    The bias is torchtitan's buffer ``expert_bias_E`` of each MoE layer, float32 and part
    of the checkpoint; a rule says how it moves when the optimizer steps. Every layer has
    a component of its own, and the first of a rank moves the biases of all its layers at
    once, stacked. A rule of one's own is a subclass with a ``type_name``.
    """

    type_name: ClassVar[str]
    """Name of the rule in a job config: ``[model.expert_bias] type = "..."``."""

    kinds: ClassVar[dict[str, type[ExpertBias]]] = {}
    """Every rule that can be configured, by ``type_name``."""

    filled_by_job: ClassVar[frozenset[str]] = frozenset()
    """Fields of the Config that ``update_from_config`` fills."""

    moves: ClassVar[bool] = True
    """Whether the rule ever changes the bias, so that it needs the counts of every step."""

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if "type_name" in cls.__dict__:
            ExpertBias.kinds[cls.type_name] = cls

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        reset: bool = False
        """Start from a bias of zero where the job begins from a checkpoint with a learned
        one. Once: a restart of the same job goes on with what it has learned since."""

        changes: list[Change] = field(default_factory=list)
        """When the value that the rule is tuned by changes, and to what."""

        def describe(self) -> str:
            """The rule and what it was given in one phrase, for messages and the trace."""
            hidden = self._owner.filled_by_job | {"param_init", "sharding_config"}
            given = {
                field.name: getattr(self, field.name)
                for field in dataclasses.fields(self)
                if field.name not in hidden
            }
            settings = [f"{name} {value}" for name, value in given.items() if value]
            return f"{self._owner.type_name} ({', '.join(settings)})".removesuffix(" ()")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def set_progress(self, step: int, tokens: int) -> None:
        """Take the values of the schedule. On the host, before the bias is moved.

        Args:
            step: the optimizer step that is about to end, from 1.
            tokens: tokens of the global batches of the steps before it.
        """

    def delta(self, bias_NE: torch.Tensor, counts_NE: torch.Tensor) -> torch.Tensor:
        """What to add to the biases of N layers after a step.

        Args:
            bias_NE: float32 ``(N, E)``.
            counts_NE: tokens that selected each expert in the whole step, over all ranks,
                int64 ``(N, E)``.

        Returns:
            float32 ``(N, E)``.
        """
        raise NotImplementedError

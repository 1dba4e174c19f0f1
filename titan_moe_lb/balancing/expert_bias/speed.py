"""Base class for bias rules with an update speed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from titan_moe_lb.balancing.expert_bias.base import ExpertBias
from titan_moe_lb.balancing.value_schedule import check_changes, value_at
from titan_moe_lb.errors import JobError


class SpeedBias(ExpertBias):
    """Base class of rules whose updates are proportional to a speed, which can follow a schedule.

    Attributes:
        speed: speed in the step that is about to end.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ExpertBias.Config):
        """Settings of a rule with a speed."""

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

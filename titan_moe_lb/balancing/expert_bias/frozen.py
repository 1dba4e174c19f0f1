"""Bias rule that applies a bias without updates."""

from __future__ import annotations

from typing import ClassVar

from titan_moe_lb.balancing.expert_bias.base import ExpertBias


class FrozenBias(ExpertBias):
    """Unchanged bias of the checkpoint, applied to the choice.

    DeepSeek-V3 trained its last 500 billion tokens with a frozen bias (arXiv 2412.19437,
    section 4.2).
    """

    type_name: ClassVar[str] = "frozen"
    moves: ClassVar[bool] = False
    filled_by_job: ClassVar[frozenset[str]] = ExpertBias.filled_by_job | {"changes"}
    """Fields that a job file cannot set; the rule has no value that could change."""

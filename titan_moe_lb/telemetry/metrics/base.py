"""Base class of the metrics: name, reduction, column in the trace and chart in one declaration.

A metric of one's own is a subclass with a ``name``. Every logged step measures it, reduces it over
ranks and layers, writes its column and sends it to the sinks. The report draws a chart of it.
"""

from __future__ import annotations

from enum import Enum
from typing import ClassVar

import numpy as np

from titan_moe_lb.balancing.component import enter
from titan_moe_lb.balancing.router import LoadBalancedRouter
from titan_moe_lb.telemetry.rank_step import RankStep
from titan_moe_lb.traces.trace_columns import Column


class Reduction(Enum):
    """How several numbers become one: those of the ranks that route a stage's tokens, or of layers."""

    SUM = "sum"
    """Each has a part, the sum is the whole."""
    MEAN = "mean"
    """All count alike."""
    MAX = "max"
    """The largest decides, as the rank that the others wait for."""


class Metric:
    """One number of each MoE layer and logged step."""

    name: ClassVar[str]
    """Name of the trace's column, and of the sinks' key behind ``moe/``."""

    description: ClassVar[str]
    """One sentence, for the chart of the report."""

    over_ranks: ClassVar[Reduction]

    over_layers: ClassVar[Reduction] = Reduction.MEAN

    of_step: ClassVar[bool] = False
    """The number belongs to the step, not to a layer: all rows of the trace repeat it."""

    kinds: ClassVar[dict[str, type[Metric]]] = {}
    """Every metric, by name."""

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            enter(Metric.kinds, "name", cls)

    @classmethod
    def column(cls) -> Column:
        """Its column in the trace."""
        return Column(
            cls.name,
            per="step" if cls.of_step else "layer",
            summary=cls.over_layers.value,
            description=cls.description,
        )

    @classmethod
    def applies_to(cls, router: LoadBalancedRouter.Config) -> bool:
        """Whether such a router has it. The trace has the column if one router of the model does."""
        return True

    def measure(self, step: RankStep) -> np.ndarray | None:
        """Compute this rank's numbers.

        Returns:
            float64 ``(N,)``, one for each router of the rank, NaN for a router without the number;
            None if no router has it, on all ranks of the stage alike.
        """
        raise NotImplementedError

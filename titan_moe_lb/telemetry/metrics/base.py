"""Base class of the metrics: one declaration of name, reductions, trace column and chart.

A subclass with a ``name`` is a new metric. Every logged step measures it, reduces it over ranks
and layers, writes its column and logs it to the sinks. The report draws a chart of it.
"""

from __future__ import annotations

from enum import Enum
from typing import ClassVar

import numpy as np

from titan_moe_lb.balancing.component import enter, first_paragraph
from titan_moe_lb.balancing.router import LoadBalancedRouter
from titan_moe_lb.errors import JobError
from titan_moe_lb.telemetry.rank_step import RankStep
from titan_moe_lb.traces.columns import Column


class Reduction(Enum):
    """Reduction of several numbers to one, over the ranks of a pipeline stage or over layers."""

    SUM = "sum"
    """The numbers are parts of a whole."""
    MEAN = "mean"
    """All numbers have equal weight."""
    MAX = "max"
    """The largest number decides, as for the rank that the others wait for."""


class Metric:
    """Base class of the metrics: one number for each MoE layer and logged step."""

    name: ClassVar[str]
    """Name of the column in the trace; the sinks' key is ``moe/`` and the name."""

    title: ClassVar[str] = ""
    """Heading of the chart in the report; by default the name with spaces."""

    description: ClassVar[str] = ""
    """One sentence for the chart in the report; by default the first paragraph of the docstring."""

    over_ranks: ClassVar[Reduction]
    """Reduction over the ranks that route tokens of a stage."""

    over_layers: ClassVar[Reduction] = Reduction.MEAN
    """Reduction over the layers."""

    of_step: ClassVar[bool] = False
    """True if the number belongs to the step, not to a layer; every row of the trace repeats it."""

    kinds: ClassVar[dict[str, type[Metric]]] = {}
    """All metrics, by name."""

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            enter(Metric.kinds, "name", cls)
            if not isinstance(getattr(cls, "over_ranks", None), Reduction):
                del Metric.kinds[cls.name]
                raise JobError(
                    f"the metric {cls.__name__} has no over_ranks: set it to Reduction.SUM, MEAN or "
                    "MAX"
                )

    @classmethod
    def column(cls) -> Column:
        """Return the declaration of its column in the trace."""
        return Column(
            cls.name,
            per="step" if cls.of_step else "layer",
            summary=cls.over_layers.value,
            description=cls.description or first_paragraph(cls),
            title=cls.title,
        )

    @classmethod
    def applies_to(cls, router: LoadBalancedRouter.Config) -> bool:
        """Return True if routers of this Config have the metric.

        The trace has the column if a router of the model has the metric.
        """
        return True

    def measure(self, step: RankStep) -> np.ndarray | None:
        """Compute the numbers of this rank.

        Returns:
            float64 ``(N,)``, one number for each router of the rank, NaN for a router without it.
            None if no router has it; then all ranks of the stage must return None.
        """
        raise NotImplementedError

"""The answer, and what to do."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from titan_moe_lb.commands.plan.plan_arguments import PlanArguments
from titan_moe_lb.costmodel.hardware.device import Hardware
from titan_moe_lb.costmodel.times.served_load import ServedLoad
from titan_moe_lb.costmodel.times.served_model import ServedModel
from titan_moe_lb.costmodel.times.serving import ServedDegree, ServedRow


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A row, and the degree that it is of."""

    ep_degree: int
    row: ServedRow


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What was asked, and what comes of it at every degree."""

    model: ServedModel
    flags: PlanArguments
    context: int
    judged: ServedLoad
    """The run's with experts in blocks, else the first log-normal one, else the first."""
    device: Hardware
    """With its peaks, not derated."""
    usable_bytes: float
    degrees: tuple[ServedDegree, ...]
    run: dict[str, Any] | None
    """What the rows of placements are of."""

    def _judged(self) -> list[Choice]:
        """Rows under that load."""
        return [
            Choice(ep_degree=degree.ep_degree, row=row)
            for degree in self.degrees
            for row in degree.rows
            if row.load == self.judged.name
        ]

    def _decoding(self) -> list[Choice]:
        """Those whose sequences fit."""
        return [one for one in self._judged() if one.row.decode.fits]

    @property
    def most_decoded(self) -> Choice | None:
        """Most new tokens a second on each device; None where nothing fits."""
        return max(self._decoding(), key=lambda one: one.row.decode.tokens_per_second, default=None)

    @property
    def shortest_step(self) -> Choice | None:
        """The shortest time between two tokens of a sequence."""
        return min(self._decoding(), key=lambda one: one.row.decode.step_seconds, default=None)

    @property
    def most_prefilled(self) -> Choice | None:
        """Most prompt tokens a second on each device."""
        fitting = [one for one in self._judged() if one.row.prefill.fits]
        return max(fitting, key=lambda one: one.row.prefill.tokens_per_second, default=None)

    def as_json(self) -> dict[str, Any]:
        """Plain data. Seconds, bytes, tokens of one rank."""

        def plain(choice: Choice | None) -> dict[str, Any] | None:
            return None if choice is None else dataclasses.asdict(choice)

        first = next(iter(self.model.moe_layers.values()))
        return {
            "verdict": {
                "load": self.judged.name,
                "most_decoded": plain(self.most_decoded),
                "shortest_step": plain(self.shortest_step),
                "most_prefilled": plain(self.most_prefilled),
            },
            "model": {
                "model": self.model.model_name,
                "flavor": self.model.flavor,
                "moe_layers": list(self.model.expert_bytes),
                **dataclasses.asdict(first),
                "cache_bytes_per_sequence": self.model.cache_bytes(self.context),
            },
            "hardware": dataclasses.asdict(self.device),
            "usable_memory_bytes": self.usable_bytes,
            "assumptions": {"context": self.context, **self.flags.assumptions},
            "degrees": [dataclasses.asdict(degree) for degree in self.degrees],
            "run": self.run,
        }

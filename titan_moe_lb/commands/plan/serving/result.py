"""Result of ``titan-moe-lb plan --serve``, and its best rows."""

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
    """Row with its expert-parallel degree."""

    ep_degree: int
    row: ServedRow


@dataclass(frozen=True, kw_only=True)
class Serving:
    """Plan of a deployment at every expert-parallel degree."""

    model: ServedModel
    flags: PlanArguments
    context: int
    judged: ServedLoad
    """Load of the verdict: the run's with contiguous experts, else the first log-normal load, else
    the first two-level load."""
    device: Hardware
    """Device with its peaks, not derated."""
    usable_bytes: float
    degrees: tuple[ServedDegree, ...]
    run: dict[str, Any] | None
    """Facts of the run that the rows of placements use; None without a run."""

    def _judged(self, phase: str) -> list[Choice]:
        """List the rows under the judged load whose ``decode`` or ``prefill`` step fits."""
        return [
            Choice(ep_degree=degree.ep_degree, row=row)
            for degree in self.degrees
            for row in degree.rows
            if row.load == self.judged.name and getattr(row, phase).fits
        ]

    @property
    def most_decoded(self) -> Choice | None:
        """Row with most decoded tokens per second on each device; None if nothing fits."""
        fitting = self._judged("decode")
        return max(fitting, key=lambda one: one.row.decode.tokens_per_second, default=None)

    @property
    def shortest_step(self) -> Choice | None:
        """Row with the shortest time between two tokens of a sequence; None if nothing fits."""
        return min(
            self._judged("decode"), key=lambda one: one.row.decode.step_seconds, default=None
        )

    @property
    def most_prefilled(self) -> Choice | None:
        """Row with most prefilled tokens per second on each device; None if nothing fits."""
        fitting = self._judged("prefill")
        return max(fitting, key=lambda one: one.row.prefill.tokens_per_second, default=None)

    def as_json(self) -> dict[str, Any]:
        """Convert to plain data in seconds, bytes and tokens of one rank."""
        best = {
            name: choice and dataclasses.asdict(choice)
            for name in ("most_decoded", "shortest_step", "most_prefilled")
            for choice in [getattr(self, name)]
        }
        first = next(iter(self.model.moe_layers.values()))
        return {
            "verdict": {"load": self.judged.name, **best},
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

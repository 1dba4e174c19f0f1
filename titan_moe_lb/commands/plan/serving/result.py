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

    def best(self) -> dict[str, Choice | None]:
        """Find the best rows under the judged load among those whose step fits; None if none does.

        They decode most tokens per second on each device, have the shortest time between two tokens
        of a sequence, and prefill most tokens per second on each device.
        """
        judged = [
            Choice(ep_degree=degree.ep_degree, row=row)
            for degree in self.degrees
            for row in degree.rows
            if row.load == self.judged.name
        ]
        decoding = [one for one in judged if one.row.decode.fits]
        ahead = [one for one in judged if one.row.prefill.fits]
        return {
            "most_decoded": max(
                decoding, key=lambda one: one.row.decode.tokens_per_second, default=None
            ),
            "shortest_step": min(
                decoding, key=lambda one: one.row.decode.step_seconds, default=None
            ),
            "most_prefilled": max(
                ahead, key=lambda one: one.row.prefill.tokens_per_second, default=None
            ),
        }

    def as_json(self) -> dict[str, Any]:
        """Convert to plain data in seconds, bytes and tokens of one rank."""
        best = {name: choice and dataclasses.asdict(choice) for name, choice in self.best().items()}
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

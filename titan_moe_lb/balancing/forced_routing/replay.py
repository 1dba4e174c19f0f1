"""Replay of a recorded run, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from titan_moe_lb.balancing.forced_routing.base import ForcedRouting
from titan_moe_lb.parallel.batch_cut import first_sequences
from titan_moe_lb.traces.routing_trace import open_routing_trace


class Replay(ForcedRouting):
    """Send each token of the global batch to the experts of a recorded step.

    The recorded steps are replayed in order, and then again from the first. A resumed job continues
    where it stopped. The replay is exact under any layout of the same global batch.
    """

    type_name: ClassVar[str] = "replay"

    @dataclass(kw_only=True, slots=True)
    class Config(ForcedRouting.Config):
        trace: str
        """Folder of the run that recorded its routing."""

        steps: list[int] | None = None
        """Recorded steps to replay, in this order; None: all of them."""

        def tensors(self) -> dict[str, torch.Tensor]:
            """Return an empty tensor, which ``wire`` fills."""
            # The shape depends on the number of recorded steps.
            return {"expert_ids_NBLK": torch.zeros(0)}

    expert_ids_NBLK: torch.Tensor

    def wire(self, groups, layer: int) -> None:
        """Read this rank's tokens of the recorded steps."""
        trace = open_routing_trace(self.config.trace)
        cut = self.config.batch_cut
        assert cut is not None
        positions = np.concatenate(
            [
                np.arange(start, start + length)
                for start, length in groups.token_slices(
                    cut.seq_len, cut.context_parallel_load_balancer
                )
            ]
        )
        parts = [
            trace.expert_ids(step, layer, range(first, first + cut.micro_batch_size))[:, positions]
            for step in (self.config.steps or trace.steps)
            for first in first_sequences(cut, groups)
        ]
        ids_NBLK = np.stack(parts).astype(np.uint8 if self.num_experts <= 256 else np.int32)
        self.expert_ids_NBLK = torch.from_numpy(ids_NBLK).to(self.expert_ids_NBLK.device)

    def forward(self, scores_BLE, forward_number, limit_groups) -> torch.Tensor:
        """Return the recorded experts of the forward."""
        index = (forward_number % self.expert_ids_NBLK.shape[0]).unsqueeze(0)
        return self.expert_ids_NBLK.index_select(0, index)[0].long()

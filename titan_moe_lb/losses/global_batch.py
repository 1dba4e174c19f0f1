"""The load-balancing loss over the global batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import spmd_types as spmd
import torch
import torch.distributed._functional_collectives as funcol
from torchtitan.models.common.decoder_sharding import dense_param_placement
from torchtitan.protocols.sharding import ShardingConfig

from titan_moe_lb.losses.base import LoadBalanceLoss
from titan_moe_lb.parallel.local_shard import local_shard
from titan_moe_lb.recording.recomputation import is_recomputation


class GlobalBatchAuxLoss(LoadBalanceLoss):
    """f over the whole global batch, P over the tokens at hand.

    Source: arXiv 2501.11873, Eqs. 3 and 4; what Qwen3 trained with (arXiv
    2505.09388). The counts of the running step are not known while its first
    micro-batch runs backward, so one of two stand-ins is taken:

    - ``previous_step``: the counts of the last optimizer step, reduced over every
      rank and micro-batch. f is then one constant, the loss is exactly additive, and
      its gradient depends neither on the layout nor on the schedule. In the first
      step f = 1, whose gradient is zero. The counts are part of the checkpoint.
    - ``running``: the buffer of the paper: the micro-batches so far of the running
      step, over the data-parallel ranks. One small collective a forward.
    """

    type_name: ClassVar[str] = "global_batch"
    metric_name: ClassVar[str] = "global_load_balancing_loss"

    @dataclass(kw_only=True, slots=True)
    class Config(LoadBalanceLoss.Config):
        counts: Literal["previous_step", "running"] = "previous_step"
        """Where f comes from; see the class."""

        def update_from_config(self, *, config, num_experts: int) -> None:
            LoadBalanceLoss.Config.update_from_config(self, config=config, num_experts=num_experts)
            # The same counts on every rank; torchtitan asks for a layout of all state.
            self.sharding_config = ShardingConfig(
                state_shardings={"counts_E": dense_param_placement(tp=spmd.R)}
            )

    counts_E: torch.Tensor

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.counts = config.counts
        self._data_parallel_group = None
        # previous_step: the global batch of the last step. running: of this step so far.
        self.register_buffer(
            "counts_E",
            torch.zeros(self.num_experts, dtype=torch.int64),
            persistent=config.counts == "previous_step",
        )

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        self.counts_E = torch.zeros(
            self.num_experts, dtype=torch.int64, device=buffer_device or self.counts_E.device
        )

    def wire_meshes(self, parallel_dims) -> None:
        if self.counts == "running" and parallel_dims.dp_enabled:
            self._data_parallel_group = parallel_dims.get_mesh("batch").get_group()

    @property
    def needs_counts(self) -> bool:
        return self.counts == "running"

    @property
    def needs_step_counts(self) -> bool:
        return self.counts == "previous_step"

    def load(
        self, counts_BE: torch.Tensor | None, top_k: int, sequence_length: int
    ) -> torch.Tensor:
        counts_E = local_shard(self.counts_E)
        if counts_BE is not None and self.needs_counts and not is_recomputation():
            batch_E = counts_BE.sum(dim=0)
            if self._data_parallel_group is not None:
                batch_E = funcol.all_reduce(batch_E, "sum", self._data_parallel_group)
            counts_E.add_(batch_E.to(torch.int64))
        total = counts_E.sum()
        load_E = counts_E * (self.num_experts / total.clamp_min(1))
        return torch.where(total > 0, load_E, 1.0).to(torch.float32).unsqueeze(0)

    def finish_step(self, global_counts_E: torch.Tensor) -> None:
        """Take the counts of the finished step over all ranks ``(E,)``, or start anew."""
        counts_E = local_shard(self.counts_E)
        if self.counts == "previous_step":
            counts_E.copy_(global_counts_E)
        else:
            counts_E.zero_()

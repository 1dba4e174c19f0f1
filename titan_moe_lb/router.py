"""The router: torchtitan's top-k router with losses and a recorder on it.

Shape suffixes as in torchtitan's ``models/common/moe.py``: B = batch, L = local
tokens of a sequence, D = model dimension, E = experts, K = top_k; A = losses.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import spmd_types as spmd
import torch
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torchtitan.models.common.moe import TokenChoiceTopKRouter
from torchtitan.protocols.module import ModuleList

from titan_moe_lb import layout
from titan_moe_lb.losses.base import AuxLoss, LoadBalanceLoss
from titan_moe_lb.losses.functional import count_tokens_per_expert, probability_sums
from titan_moe_lb.losses.injection import gather_scores
from titan_moe_lb.telemetry.recorder import LoadRecorder


class LoadBalancedRouter(TokenChoiceTopKRouter):
    """Token-choice top-k routing with auxiliary losses.

    Parameter names and, with no losses, every bit of the result are those of
    ``TokenChoiceTopKRouter``. It reads which mesh axes split a sequence from its
    config and the meshes themselves from :meth:`wire_meshes`.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(TokenChoiceTopKRouter.Config):
        aux_losses: list[AuxLoss.Config] = field(default_factory=list)

        sequence_axes: tuple[str, ...] = ()
        """Mesh axes over which the tokens of one sequence are split."""

        sequence_shards: int = 1
        """Ranks that hold one sequence: the product of the sizes of ``sequence_axes``."""

        token_replicas: int = 1
        """Ranks that see the same tokens and whose gradients are summed (TP without EP)."""

        def update_from_config(self, *, config) -> None:
            """Bind the router and its losses to a ``Trainer.Config``."""
            dims = layout.resolve(config.parallelism)
            # With EP, torchtitan shards the tokens of a sequence over TP ranks before
            # the gate; without, every TP rank routes the same tokens.
            shards = {"cp": dims.cp, "tp": dims.tp if dims.ep > 1 else 1}
            self.sequence_axes = tuple(axis for axis, size in shards.items() if size > 1)
            self.sequence_shards = shards["cp"] * shards["tp"]
            # spmd_types keeps plain tensors, whose gradient on a replicated axis is a
            # partial sum. A DTensor's gradient is whole on every rank.
            plain = config.parallelism.spmd_backend == "spmd_types"
            self.token_replicas = dims.tp if plain and dims.ep == 1 else 1
            for loss in self.aux_losses:
                loss.update_from_config(config=config)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.aux_losses = ModuleList(loss.build() for loss in config.aux_losses)
        self.recorder = LoadRecorder.Config(
            num_experts=config.num_experts, num_losses=len(config.aux_losses)
        ).build()
        self.sequence_axes = config.sequence_axes
        self.sequence_shards = config.sequence_shards
        self.token_replicas = config.token_replicas
        self._sequence_groups: list = []

    def wire_meshes(self, parallel_dims) -> None:
        """Take the process groups over which a sequence is split. Once, before training."""
        self._sequence_groups = [
            parallel_dims.get_mesh(axis).get_group() for axis in self.sequence_axes
        ]

    def forward(
        self, x_BLD: torch.Tensor, expert_bias_E: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            x_BLD: input ``(B, L, D)``.
            expert_bias_E: bias of the selection, not of the scores ``(E,)``.

        Returns:
            Routing scores ``(B, L, K)``, expert ids ``(B, L, K)`` int64, and the full
            scores ``(B, L, E)``.
        """
        scores_BLE = self._scores(x_BLD)
        topk_expert_ids_BLK = self._select(scores_BLE, expert_bias_E)
        topk_scores_BLK = self._gather(scores_BLE, topk_expert_ids_BLK, expert_bias_E)
        if self.route_norm:
            topk_scores_BLK = topk_scores_BLK / (
                topk_scores_BLK.sum(dim=-1, keepdim=True) + 1e-20
            )
        return topk_scores_BLK * self.route_scale, topk_expert_ids_BLK, scores_BLE

    def _scores(self, x_BLD: torch.Tensor) -> torch.Tensor:
        # float32 keeps the gate's rounding out of the balance of the experts.
        with torch.autocast(device_type=x_BLD.device.type, dtype=torch.float32):
            logits_BLE = self.gate(x_BLD)
        if self.score_func == "softmax":
            return F.softmax(logits_BLE, dim=-1)
        return torch.sigmoid(logits_BLE)

    def _select(
        self, scores_BLE: torch.Tensor, expert_bias_E: torch.Tensor | None
    ) -> torch.Tensor:
        if self._debug_force_load_balance:
            return self._debug_force_load_balance_routing(scores_BLE)[0]
        choice_BLE = scores_BLE if expert_bias_E is None else scores_BLE + expert_bias_E
        if self.num_expert_groups is not None:
            choice_BLE = self._get_node_limited_routing_scores(choice_BLE)
        return torch.topk(choice_BLE, k=self.top_k, dim=-1, sorted=False).indices

    def _gather(
        self,
        scores_BLE: torch.Tensor,
        topk_expert_ids_BLK: torch.Tensor,
        expert_bias_E: torch.Tensor | None,
    ) -> torch.Tensor:
        """The selected scores, with the gradient of the losses; records the counts."""
        if not self.training:
            return scores_BLE.gather(dim=-1, index=topk_expert_ids_BLK)
        # Counts and coefficients are per rank until they are summed here, so the
        # region works on local tensors and is typed at its boundary.
        with spmd.no_typecheck(), torch.no_grad():
            local_scores_BLE = _local(scores_BLE)
            local_ids_BLK = _local(topk_expert_ids_BLK)
            counts_BE = count_tokens_per_expert(local_ids_BLK, self.num_experts)
            coefficients_BE, losses_A = self._losses(
                local_scores_BLE, counts_BE, biased=expert_bias_E is not None
            )
            self.recorder.record(counts_BE.sum(dim=0), losses_A)
        if coefficients_BE is None:
            return scores_BLE.gather(dim=-1, index=topk_expert_ids_BLK)
        sums_to_one = self.score_func == "softmax"
        if not isinstance(scores_BLE, DTensor):
            return gather_scores(
                scores_BLE, topk_expert_ids_BLK, coefficients_BE, sums_to_one=sums_to_one
            )
        gathered_BLK = gather_scores(
            scores_BLE.to_local(), local_ids_BLK, coefficients_BE, sums_to_one=sums_to_one
        )
        return DTensor.from_local(
            gathered_BLK, scores_BLE.device_mesh, scores_BLE.placements, run_check=False
        )

    def _losses(
        self, scores_BLE: torch.Tensor, selected_counts_BE: torch.Tensor, *, biased: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Weighted coefficients of the probability sums, and the raw values ``(A,)``."""
        if not self.aux_losses:
            return None, None
        counts_by_source = {"selected": selected_counts_BE}
        if any(loss.count_from == "scores" for loss in self.aux_losses):
            differs = biased or self.num_expert_groups is not None
            counts_by_source["scores"] = (
                self._unbiased_counts(scores_BLE) if differs else selected_counts_BE
            )
        counts_by_source = {
            source: self._sum_over_sequence(counts) for source, counts in counts_by_source.items()
        }
        sums_BE = probability_sums(scores_BLE)
        sequence_length = scores_BLE.shape[1] * self.sequence_shards
        total, values = None, []
        for loss in self.aux_losses:
            assert isinstance(loss, LoadBalanceLoss)
            coefficients = loss.coefficients(
                counts_by_source[loss.count_from], self.top_k, sequence_length
            )
            values.append((coefficients * sums_BE).sum())
            weighted = coefficients * (loss.weight / self.token_replicas)
            total = weighted if total is None else total + weighted
        return total, torch.stack(values)

    def _unbiased_counts(self, scores_BLE: torch.Tensor) -> torch.Tensor:
        ids_BLK = torch.topk(scores_BLE, k=self.top_k, dim=-1, sorted=False).indices
        return count_tokens_per_expert(ids_BLK, self.num_experts)

    def _sum_over_sequence(self, counts_BE: torch.Tensor) -> torch.Tensor:
        for group in self._sequence_groups:
            counts_BE = funcol.all_reduce(counts_BE, "sum", group)
        return counts_BE


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

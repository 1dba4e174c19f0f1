"""The router: torchtitan's top-k router with losses and a recorder on it.

Shape suffixes as in torchtitan's ``models/common/moe.py``: B = batch, L = local
tokens of a sequence, D = model dimension, E = experts, K = top_k; A = losses,
S = sources that the losses count from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import spmd_types as spmd
import torch
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torchtitan.models.common.moe import TokenChoiceTopKRouter
from torchtitan.protocols.module import ModuleDict

from titan_moe_lb import layout
from titan_moe_lb.local_shard import local_shard
from titan_moe_lb.losses.base import AuxLoss, LoadBalanceLoss
from titan_moe_lb.losses.functional import count_tokens_per_expert, probability_sums
from titan_moe_lb.losses.injection import gather_scores, scores_with_z_loss
from titan_moe_lb.losses.z_loss import RouterZLoss
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
                loss.update_from_config(config=config, num_experts=self.num_experts)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        # By name, so that the state of a loss keeps its place when others come and go.
        self.aux_losses = ModuleDict(
            {loss._owner.type_name: loss.build() for loss in config.aux_losses}
        )
        counting = [
            loss.count_from
            for loss in self.aux_losses.values()
            if isinstance(loss, LoadBalanceLoss)
        ]
        self.count_sources = ["selected", *(["scores"] if "scores" in counting else [])]
        self.recorder = LoadRecorder.Config(
            num_experts=config.num_experts,
            num_sources=len(self.count_sources),
            num_losses=len(config.aux_losses),
        ).build()
        self.sequence_axes = config.sequence_axes
        self.sequence_shards = config.sequence_shards
        self.token_replicas = config.token_replicas
        self._sequence_groups: list | None = None if config.sequence_axes else []

    def wire_meshes(self, parallel_dims) -> None:
        """Take the process groups of the job. Once, before training."""
        self._sequence_groups = [
            parallel_dims.get_mesh(axis).get_group() for axis in self.sequence_axes
        ]
        for loss in self.aux_losses.values():
            loss.wire_meshes(parallel_dims)

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
        # float32 keeps the gate's rounding out of the balance of the experts.
        with torch.autocast(device_type=x_BLD.device.type, dtype=torch.float32):
            logits_BLE = self.gate(x_BLD)
        values: dict[AuxLoss, torch.Tensor] = {}
        scores_BLE = self._score(logits_BLE, values)
        topk_expert_ids_BLK = self._select(scores_BLE, expert_bias_E)
        topk_scores_BLK = self._gather(scores_BLE, topk_expert_ids_BLK, expert_bias_E, values)
        if self.route_norm:
            topk_scores_BLK = topk_scores_BLK / (topk_scores_BLK.sum(dim=-1, keepdim=True) + 1e-20)
        return topk_scores_BLK * self.route_scale, topk_expert_ids_BLK, scores_BLE

    def _score(self, logits_BLE: torch.Tensor, values: dict[AuxLoss, torch.Tensor]) -> torch.Tensor:
        """The score function; attaches the z-loss and notes its raw value."""
        softmax = self.score_func == "softmax"
        z_loss = next(
            (loss for loss in self.aux_losses.values() if isinstance(loss, RouterZLoss)), None
        )
        if z_loss is None or not self.training:
            return F.softmax(logits_BLE, dim=-1) if softmax else torch.sigmoid(logits_BLE)
        coefficient = z_loss.coefficient(local_shard(logits_BLE).shape[1] * self.sequence_shards)
        weighted = coefficient * z_loss.weight / self.token_replicas

        def score(local_logits_BLE: torch.Tensor) -> torch.Tensor:
            scores_BLE, logsumexp_BL = scores_with_z_loss(
                local_logits_BLE, weighted, softmax=softmax
            )
            with spmd.no_typecheck(), torch.no_grad():
                values[z_loss] = coefficient * logsumexp_BL.square().sum()
            return scores_BLE

        return _on_local(score, logits_BLE)

    def _select(self, scores_BLE: torch.Tensor, expert_bias_E: torch.Tensor | None) -> torch.Tensor:
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
        values: dict[AuxLoss, torch.Tensor],
    ) -> torch.Tensor:
        """The selected scores; attaches the load-balancing losses and records the step."""
        if not self.training:
            return scores_BLE.gather(dim=-1, index=topk_expert_ids_BLK)
        # Counts and coefficients are per rank until they are summed here, so the
        # region works on local tensors and is typed at its boundary.
        with spmd.no_typecheck(), torch.no_grad():
            local_ids_BLK = local_shard(topk_expert_ids_BLK)
            counts_SBE = self._counts(
                local_shard(scores_BLE), local_ids_BLK, biased=expert_bias_E is not None
            )
            coefficients_BE = self._coefficients(local_shard(scores_BLE), counts_SBE, values)
            losses_A = (
                torch.stack([values[loss] for loss in self.aux_losses.values()]) if values else None
            )
            self.recorder.record(counts_SBE.sum(dim=1), losses_A)
        if coefficients_BE is None:
            return scores_BLE.gather(dim=-1, index=topk_expert_ids_BLK)
        return _on_local(
            lambda scores: gather_scores(
                scores, local_ids_BLK, coefficients_BE, sums_to_one=self.score_func == "softmax"
            ),
            scores_BLE,
        )

    def _counts(
        self, scores_BLE: torch.Tensor, selected_BLK: torch.Tensor, *, biased: bool
    ) -> torch.Tensor:
        """Local tokens per source, sequence and expert ``(S, B, E)``."""
        counts = [count_tokens_per_expert(selected_BLK, self.num_experts)]
        if "scores" in self.count_sources:
            if biased or self.num_expert_groups is not None:
                unbiased_BLK = torch.topk(scores_BLE, k=self.top_k, dim=-1, sorted=False).indices
                counts.append(count_tokens_per_expert(unbiased_BLK, self.num_experts))
            else:
                counts.append(counts[0])
        return torch.stack(counts)

    def _coefficients(
        self,
        scores_BLE: torch.Tensor,
        counts_SBE: torch.Tensor,
        values: dict[AuxLoss, torch.Tensor],
    ) -> torch.Tensor | None:
        """Weighted gradient of the losses in the probability sums; notes the raw values."""
        losses = [loss for loss in self.aux_losses.values() if isinstance(loss, LoadBalanceLoss)]
        if not losses:
            return None
        counts_by_source = self._sum_over_sequence(
            {loss.count_from for loss in losses if loss.needs_counts}, counts_SBE
        )
        sums_BE = probability_sums(scores_BLE, sums_to_one=self.score_func == "softmax")
        sequence_length = scores_BLE.shape[1] * self.sequence_shards
        total = torch.zeros_like(sums_BE)
        for loss in losses:
            counts_BE = counts_by_source.get(loss.count_from)
            coefficients = loss.coefficients(counts_BE, self.top_k, sequence_length)
            values[loss] = (coefficients * sums_BE).sum()
            total = total + coefficients * (loss.weight / self.token_replicas)
        return total

    def _sum_over_sequence(
        self, sources: set[str], counts_SBE: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Counts of whole sequences for the sources that are asked for, in one tensor."""
        assert self._sequence_groups is not None, (
            "the router's meshes are not wired: use titan_moe_lb.model_spec.balanced for the "
            "ModelSpec, or call wire_meshes(parallel_dims)"
        )
        wanted = [source for source in self.count_sources if source in sources]
        if not wanted:
            return {}
        # Row by row: a list as an index would be copied from the host in every forward.
        counts = torch.stack([counts_SBE[self.count_sources.index(source)] for source in wanted])
        for group in self._sequence_groups:
            counts = funcol.all_reduce(counts, "sum", group)
        return dict(zip(wanted, counts.unbind(), strict=True))


def _on_local(
    function: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor
) -> torch.Tensor:
    """Apply a function that keeps the placement of its argument to the local shard."""
    if not isinstance(tensor, DTensor):
        return function(tensor)
    return DTensor.from_local(
        function(tensor.to_local()), tensor.device_mesh, tensor.placements, run_check=False
    )

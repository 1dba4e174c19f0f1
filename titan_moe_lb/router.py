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
from spmd_types.runtime import get_local_type, get_partition_spec
from torch import nn
from torch.distributed.tensor import DTensor
from torchtitan.models.common.moe import MoE, TokenChoiceTopKRouter
from torchtitan.protocols.module import ModuleDict

from titan_moe_lb.expert_bias import ExpertBias
from titan_moe_lb.forced_routing.base import ForcedRouting
from titan_moe_lb.losses.base import AuxLoss, LoadBalanceLoss
from titan_moe_lb.losses.functional import count_tokens_per_expert, probability_sums
from titan_moe_lb.losses.injection import gather_scores, scores_with_z_loss
from titan_moe_lb.losses.z_loss import RouterZLoss
from titan_moe_lb.parallel import batch_cut, layout
from titan_moe_lb.parallel.local_shard import local_shard
from titan_moe_lb.recording.event_clock import EventClock
from titan_moe_lb.recording.recorder import LoadRecorder


class LoadBalancedRouter(TokenChoiceTopKRouter):
    """Token-choice top-k routing with auxiliary losses, forced routing and a recorder.

    Parameter names and, with neither losses nor forced routing, every bit of the
    result are those of ``TokenChoiceTopKRouter``. It reads which mesh axes split a
    sequence from its config and the meshes themselves from :meth:`wire_meshes`.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(TokenChoiceTopKRouter.Config):
        aux_losses: list[AuxLoss.Config] = field(default_factory=list)

        forced_routing: ForcedRouting.Config | None = None
        """What decides instead of the scores, in a benchmark."""

        layer: int = 0
        """Number of the router's layer in the whole model."""

        expert_bias: ExpertBias.Config | None = None
        """What moves the layer's expert bias; None where it has none."""

        track: bool = True
        """Keep what the metrics show: counts by micro-batch, and when each passed."""

        num_micro_batches: int = 1
        """Forwards of the router in an optimizer step."""

        recorded_tokens: tuple[int, int] | None = None
        """(B, L) of a micro-batch on a rank, to keep the experts of each token."""

        sequence_axes: tuple[str, ...] = ()
        """Mesh axes over which the tokens of one sequence are split."""

        sequence_shards: int = 1
        """Ranks that hold one sequence: the product of the sizes of ``sequence_axes``."""

        token_replicas: int = 1
        """Ranks that see the same tokens and whose gradients are summed (TP without EP)."""

        def update_from_config(self, *, config, track: bool, record_tokens: bool) -> None:
            """Bind the router, its losses and its recorder to a ``Trainer.Config``."""
            dims = layout.resolve(config.parallelism)
            cut = batch_cut.cut(config)
            self.track = track
            self.num_micro_batches = cut.num_micro_batches
            if record_tokens:
                self.recorded_tokens = (cut.micro_batch_size, cut.local_sequence_length)
            if self.forced_routing is not None:
                self.forced_routing.update_from_config(
                    config=config, num_experts=self.num_experts, top_k=self.top_k
                )
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
        self.layer = config.layer
        # Whether someone takes the counts of every step, logged or not.
        self.expert_bias = config.expert_bias.build() if config.expert_bias is not None else None
        self.needs_step_counts = (self.expert_bias is not None and self.expert_bias.moves) or any(
            loss.needs_step_counts for loss in self.aux_losses.values()
        )
        self.records = config.track or self.needs_step_counts or config.recorded_tokens is not None
        self.forced_routing = (
            config.forced_routing.build() if config.forced_routing is not None else None
        )
        by_micro_batch = config.track or config.recorded_tokens is not None
        self.recorder = LoadRecorder.Config(
            num_experts=config.num_experts,
            num_micro_batches=config.num_micro_batches if by_micro_batch else 1,
            num_sources=len(self.count_sources),
            num_losses=len(config.aux_losses),
            token_shape=(
                (*config.recorded_tokens, config.top_k) if config.recorded_tokens else None
            ),
        ).build()
        self.clock = (
            EventClock.Config(num_micro_batches=config.num_micro_batches).build()
            if by_micro_batch or config.forced_routing is not None
            else None
        )
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
        if self.forced_routing is not None:
            self.forced_routing.wire(parallel_dims, self.layer)

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
        micro_batch = self._micro_batch()
        values: dict[AuxLoss, torch.Tensor] = {}
        scores_BLE = self._score(logits_BLE, values)
        topk_expert_ids_BLK = self._select(scores_BLE, expert_bias_E, micro_batch)
        topk_scores_BLK = self._gather(
            scores_BLE, topk_expert_ids_BLK, expert_bias_E, values, micro_batch
        )
        if self.route_norm:
            topk_scores_BLK = topk_scores_BLK / (topk_scores_BLK.sum(dim=-1, keepdim=True) + 1e-20)
        return topk_scores_BLK * self.route_scale, topk_expert_ids_BLK, scores_BLE

    def _micro_batch(self) -> torch.Tensor | None:
        """Number of this forward in the step; None where nothing depends on it."""
        if self.clock is None or not self.clock.wired or not self.training:
            return None
        with spmd.no_typecheck():
            return self.clock.forward_event()

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

    def _select(
        self,
        scores_BLE: torch.Tensor,
        expert_bias_E: torch.Tensor | None,
        micro_batch: torch.Tensor | None,
    ) -> torch.Tensor:
        """The experts of every token ``(B, L, K)``, int64."""
        if self.forced_routing is not None:
            return _on_local(lambda scores: self._force(scores, micro_batch), scores_BLE)
        if self._debug_force_load_balance:
            return self._debug_force_load_balance_routing(scores_BLE)[0]
        choice_BLE = scores_BLE if expert_bias_E is None else scores_BLE + expert_bias_E
        return torch.topk(
            self._limit_groups(choice_BLE), k=self.top_k, dim=-1, sorted=False
        ).indices

    def _force(self, scores_BLE: torch.Tensor, micro_batch: torch.Tensor | None) -> torch.Tensor:
        """The choice of the forced strategy, typed as the local scores are."""
        assert self.forced_routing is not None and self.clock is not None
        with spmd.no_typecheck(), torch.no_grad():
            if micro_batch is None:  # evaluation: as the next forward of training
                micro_batch = torch.zeros_like(self.clock.forward_count)
            ids_BLK = self.forced_routing(
                scores_BLE, self.clock.forward_number(micro_batch), self._limit_groups
            )
        if spmd.is_type_checking():
            spmd.assert_type(ids_BLK, get_local_type(scores_BLE), get_partition_spec(scores_BLE))
        return ids_BLK

    def _limit_groups(self, choice_BLE: torch.Tensor) -> torch.Tensor:
        if self.num_expert_groups is None:
            return choice_BLE
        return self._get_node_limited_routing_scores(choice_BLE)

    def _gather(
        self,
        scores_BLE: torch.Tensor,
        topk_expert_ids_BLK: torch.Tensor,
        expert_bias_E: torch.Tensor | None,
        values: dict[AuxLoss, torch.Tensor],
        micro_batch: torch.Tensor | None,
    ) -> torch.Tensor:
        """The selected scores; attaches the load-balancing losses and records the step."""
        if not self.training:
            return scores_BLE.gather(dim=-1, index=topk_expert_ids_BLK)
        # Counts and coefficients are per rank until they are summed here, so the
        # region works on local tensors and is typed at its boundary.
        coefficients_BE = None
        with spmd.no_typecheck(), torch.no_grad():
            local_ids_BLK = local_shard(topk_expert_ids_BLK)
            if self.records or self.aux_losses:
                counts_SBE = self._counts(
                    local_shard(scores_BLE), local_ids_BLK, biased=expert_bias_E is not None
                )
                coefficients_BE = self._coefficients(local_shard(scores_BLE), counts_SBE, values)
            if self.records:
                self._record(counts_SBE.sum(dim=1), local_ids_BLK, values, micro_batch)

        def gather(local_scores_BLE: torch.Tensor) -> torch.Tensor:
            if coefficients_BE is None:
                chosen_BLK = local_scores_BLE.gather(dim=-1, index=local_ids_BLK)
            else:
                chosen_BLK = gather_scores(
                    local_scores_BLE,
                    local_ids_BLK,
                    coefficients_BE,
                    sums_to_one=self.score_func == "softmax",
                )
            if micro_batch is None:
                return chosen_BLK
            assert self.clock is not None
            return self.clock.backward_event(chosen_BLK, micro_batch)

        return _on_local(gather, scores_BLE)

    def _record(
        self,
        counts_SE: torch.Tensor,
        expert_ids_BLK: torch.Tensor,
        values: dict[AuxLoss, torch.Tensor],
        micro_batch: torch.Tensor | None,
    ) -> None:
        losses_A = (
            torch.stack([values[loss] for loss in self.aux_losses.values()]) if values else None
        )
        if self.clock is None or micro_batch is None or self.recorder.num_micro_batches == 1:
            slot = torch.zeros(1, dtype=torch.int64, device=counts_SE.device)
        else:
            slot = self.clock.slot(micro_batch)
        self.recorder.record(slot, counts_SE, losses_A, expert_ids_BLK)

    def _counts(
        self, scores_BLE: torch.Tensor, selected_BLK: torch.Tensor, *, biased: bool
    ) -> torch.Tensor:
        """Local tokens per source, sequence and expert ``(S, B, E)``."""
        counts = [count_tokens_per_expert(selected_BLK, self.num_experts)]
        if "scores" in self.count_sources:
            forced = self.forced_routing is not None or self._debug_force_load_balance
            if biased or forced or self.num_expert_groups is not None:
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


def moe_layers_of(model_parts: list[nn.Module]) -> list[MoE]:
    """The balanced MoE layers of this rank's pipeline stages."""
    return [
        module
        for part in model_parts
        for module in part.modules()
        if isinstance(module, MoE) and isinstance(module.router, LoadBalancedRouter)
    ]


def routers_of(model_parts: list[nn.Module]) -> list[LoadBalancedRouter]:
    """The routers of this rank's pipeline stages."""
    return [layer.router for layer in moe_layers_of(model_parts)]  # type: ignore[misc]


def _on_local(
    function: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor
) -> torch.Tensor:
    """Apply a function that keeps the placement of its argument to the local shard."""
    if not isinstance(tensor, DTensor):
        return function(tensor)
    return DTensor.from_local(
        function(tensor.to_local()), tensor.device_mesh, tensor.placements, run_check=False
    )

"""The router: torchtitan's top-k router with losses and a record on it.

Shape suffixes as in torchtitan's ``models/common/moe.py``: B = batch, L = local
tokens of a sequence, D = model dimension, E = experts, K = top_k; S = sources that
are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import spmd_types as spmd
import torch
import torch.nn.functional as F
from torch import nn
from torchtitan.models.common.moe import MoE, TokenChoiceTopKRouter

from titan_moe_lb.expert_bias import ExpertBias
from titan_moe_lb.forced_routing import ForcedRouting
from titan_moe_lb.losses.base import AuxLoss
from titan_moe_lb.losses.functional import add_tokens_, inverse_sums
from titan_moe_lb.losses.injection import gather_scores
from titan_moe_lb.losses.router_losses import RouterLosses
from titan_moe_lb.parallel import batch_cut, layout
from titan_moe_lb.parallel.local_shard import local_shard, placed_as
from titan_moe_lb.parallel.schedules import Action
from titan_moe_lb.recording.recomputation import decide, is_recomputation, keep
from titan_moe_lb.recording.step_record import RouterRecord, StepRecord


class LoadBalancedRouter(TokenChoiceTopKRouter):
    """Token-choice top-k routing with auxiliary losses, forced routing and a record.

    Parameter names and, with neither losses nor forced routing, every bit of the
    result are those of ``TokenChoiceTopKRouter``. It reads which mesh axes split a
    sequence from its config, and gets the meshes themselves and its rows of the rank's
    record from :meth:`wire`.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(TokenChoiceTopKRouter.Config):
        aux_losses: list[AuxLoss.Config] = field(default_factory=list)

        expert_bias: ExpertBias.Config | None = None
        """What moves the bias of the choice; None for no bias."""

        forced_routing: ForcedRouting.Config | None = None
        """What decides instead of the scores, in a benchmark."""

        layer: int = 0
        """Number of the router's layer in the whole model."""

        track: bool = True
        """Keep what the metrics show: the counts of each micro-batch."""

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

        finished_steps: int = 0
        """Optimizer steps of the checkpoint that the job goes on from."""

        tokens_per_step: int = 0
        """Tokens of a global batch."""

        def update_from_config(
            self, *, config, finished_steps: int, track: bool, record_tokens: bool
        ) -> None:
            """Bind the router, its losses and its strategy to a ``Trainer.Config``."""
            self.finished_steps = finished_steps
            dims = layout.resolve(config.parallelism)
            cut = batch_cut.cut(config)
            self.track = track
            self.num_micro_batches = cut.num_micro_batches
            self.tokens_per_step = cut.global_batch_size * cut.seq_len
            if record_tokens:
                self.recorded_tokens = (cut.micro_batch_size, cut.local_sequence_length)
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
                loss.update_from_config(
                    config=config, num_experts=self.num_experts, top_k=self.top_k
                )
            self.bind_forced_routing(config)

        def bind_forced_routing(self, config) -> None:
            """Tell the strategy of a benchmark what it needs of the router and the job."""
            if self.forced_routing is None:
                return
            if self.num_expert_groups is not None:
                self.forced_routing.open_groups = self.num_limited_groups
            self.forced_routing.update_from_config(
                config=config, num_experts=self.num_experts, top_k=self.top_k
            )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config
        self.layer = config.layer
        self.aux_losses = RouterLosses(config.aux_losses, config.sequence_shards)
        self.expert_bias = config.expert_bias.build() if config.expert_bias is not None else None
        self.forced_routing = (
            config.forced_routing.build() if config.forced_routing is not None else None
        )
        self.needs_step_counts = self.aux_losses.needs_step_counts or (
            self.expert_bias is not None and self.expert_bias.moves
        )
        self.decides_by_operator = False
        """The decision passes through an operator that a checkpointing policy saves."""
        self.record: RouterRecord | None = None
        self.step_record: StepRecord | None = None
        self.stage = 0
        """Pipeline stage of the layer."""
        self.actions: Sequence[Action] | None = None
        """What its pipeline rank does in a pass; None without pipeline parallelism."""

    def wire(self, step_record: StepRecord, index: int, parallel_dims) -> None:
        """Take the rows to record in and the process groups. Once, before training.

        Args:
            step_record: of all routers of the rank.
            index: of this router in it.
            parallel_dims: torchtitan's ``ParallelDims``; None in a process without a mesh.
        """
        self.step_record, self.record = step_record, step_record.router(index)
        groups = [parallel_dims.get_mesh(axis).get_group() for axis in self.config.sequence_axes]
        self.aux_losses.wire(groups, parallel_dims)
        if self.forced_routing is not None and parallel_dims is not None:
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
        if self.training:
            logits_BLE = self.aux_losses.attach_to_logits(logits_BLE, self.record)
        scores_BLE = self._score(logits_BLE)
        with spmd.no_typecheck(), torch.no_grad():
            local_scores_BLE = local_shard(scores_BLE)
            inverse_BL = self._inverse_sums(local_scores_BLE)
            local_bias_E = None if expert_bias_E is None else local_shard(expert_bias_E)
            ids_BLK, coefficients_BE = decide(
                lambda: self._decide(local_scores_BLE, local_bias_E, inverse_BL)
            )
        topk_expert_ids_BLK = placed_as(scores_BLE, ids_BLK)
        if coefficients_BE is None:
            chosen_BLK = local_shard(scores_BLE).gather(-1, ids_BLK)
        else:
            chosen_BLK = gather_scores(
                local_shard(scores_BLE), ids_BLK, coefficients_BE, inverse_BL
            )
        topk_scores_BLK = placed_as(scores_BLE, chosen_BLK)
        if self.route_norm:
            topk_scores_BLK = topk_scores_BLK / (topk_scores_BLK.sum(dim=-1, keepdim=True) + 1e-20)
        return topk_scores_BLK * self.route_scale, topk_expert_ids_BLK, scores_BLE

    def _score(self, logits_BLE: torch.Tensor) -> torch.Tensor:
        if self.score_func == "softmax":
            return F.softmax(logits_BLE, dim=-1)
        return torch.sigmoid(logits_BLE)

    def _inverse_sums(self, scores_BLE: torch.Tensor) -> torch.Tensor | None:
        """What makes probabilities of the scores, where a loss needs it."""
        if not (self.training and self.aux_losses.needs_probabilities):
            return None
        if self.score_func == "softmax":  # whose sums are 1
            return None
        return inverse_sums(scores_BLE)

    def _decide(
        self,
        scores_BLE: torch.Tensor,
        expert_bias_E: torch.Tensor | None,
        inverse_BL: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All that must not happen again when the forward is repeated. On local tensors.

        Returns:
            Expert ids ``(B, L, K)``, and the coefficients of the losses of sums.
        """
        ids_BLK = self._kept(self._choose(scores_BLE, expert_bias_E))
        coefficients_BE = None
        if self.training and self.record is not None:
            counts_SBE = self._count(ids_BLK, scores_BLE, biased=expert_bias_E is not None)
            coefficients_BE = self.aux_losses.coefficients(
                scores_BLE, counts_SBE, inverse_BL, self.record, self._kept
            )
            if not is_recomputation():
                self.record.note(counts_SBE, ids_BLK)
        return ids_BLK, coefficients_BE

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, through an operator that a checkpointing policy saves, where it needs one."""
        return keep(tensor) if self.decides_by_operator else tensor

    def _choose(self, scores_BLE: torch.Tensor, expert_bias_E: torch.Tensor | None) -> torch.Tensor:
        """The experts of every token ``(B, L, K)``, int64."""
        if self.forced_routing is not None:
            assert self.record is not None, "forced routing needs a wired router"
            number = self.record.forward_number()
            return self.forced_routing(scores_BLE, number, self._limit_groups)
        if self._debug_force_load_balance:
            return self._debug_force_load_balance_routing(scores_BLE)[0]
        choice_BLE = scores_BLE if expert_bias_E is None else scores_BLE + expert_bias_E
        return self._limit_groups(choice_BLE).topk(self.top_k, dim=-1, sorted=False).indices

    def _limit_groups(self, choice_BLE: torch.Tensor) -> torch.Tensor:
        if self.num_expert_groups is None:
            return choice_BLE
        return self._get_node_limited_routing_scores(choice_BLE)

    def _count(
        self, ids_BLK: torch.Tensor, scores_BLE: torch.Tensor, *, biased: bool
    ) -> torch.Tensor:
        """Local tokens per source, sequence and expert, int64 ``(S, B, E)``."""
        assert self.record is not None
        sources = len(self.aux_losses.count_sources)
        counts_SBE = ids_BLK.new_zeros(sources, ids_BLK.shape[0], self.num_experts)
        add_tokens_(counts_SBE[0], ids_BLK, self.record.one)
        if sources > 1:
            unbiased_BLK = ids_BLK
            forced = self.forced_routing is not None or self._debug_force_load_balance
            if biased or forced or self.num_expert_groups is not None:
                unbiased_BLK = scores_BLE.topk(self.top_k, dim=-1, sorted=False).indices
            add_tokens_(counts_SBE[1], unbiased_BLK, self.record.one)
        return counts_SBE


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
    modules = [module for part in model_parts for module in part.modules()]
    return [module for module in modules if isinstance(module, LoadBalancedRouter)]

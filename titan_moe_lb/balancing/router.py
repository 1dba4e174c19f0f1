"""The router: torchtitan's top-k router with losses and a record on it.

Shape suffixes as in torchtitan's ``models/common/moe.py``: B = batch, L = local
tokens of a sequence, D = model dimension, E = experts, K = top_k; S = sources that
are counted, Q = sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import spmd_types as spmd
import torch
from torch import nn
from torchtitan.models.common.moe import MoE, TokenChoiceTopKRouter

from titan_moe_lb.balancing.expert_bias import ExpertBias
from titan_moe_lb.balancing.expert_bias.required import required_bias
from titan_moe_lb.balancing.float32_gate import in_float32
from titan_moe_lb.balancing.forced_routing import ForcedRouting
from titan_moe_lb.balancing.losses import counting
from titan_moe_lb.balancing.losses.base import AuxLoss
from titan_moe_lb.balancing.losses.gradient_norms import measured, taught
from titan_moe_lb.balancing.losses.injection import gather_scores
from titan_moe_lb.balancing.losses.router_losses import RouterLosses
from titan_moe_lb.balancing.recording.recomputation import (
    is_recomputation,
    save_decision,
    saved_decision,
)
from titan_moe_lb.balancing.recording.replayed import RouterReplay
from titan_moe_lb.balancing.recording.step_record import RouterRecord, StepRecord
from titan_moe_lb.balancing.recording.training_loop import TrainingLoop
from titan_moe_lb.balancing.valid_tokens.batch_tokens import BatchTokens
from titan_moe_lb.errors import JobError
from titan_moe_lb.functional import SCORE_FUNCTIONS, inverse_sums
from titan_moe_lb.parallel.local_shard import local_shard, placed_as
from titan_moe_lb.parallel.rank_groups import RankGroups
from titan_moe_lb.parallel.schedules import Action
from titan_moe_lb.resolved_job import Job


class LoadBalancedRouter(TokenChoiceTopKRouter):
    """Token-choice top-k routing with auxiliary losses, forced routing and a record.

    Parameter names and, with neither losses nor forced routing, every bit of the
    result are those of ``TokenChoiceTopKRouter``. It gets the meshes from :meth:`wire`
    and its rows of the rank's record from :meth:`note_in`. It records and teaches in a
    forward that learns: in training mode and with gradients.
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

        loop: TrainingLoop = field(default_factory=TrainingLoop)
        """What the training loop says of its steps."""

        def bind_components(self) -> None:
            """Tell losses and bias rule the router that they are of."""
            for component in (*self.aux_losses, self.expert_bias):
                if component is not None:
                    component.bind(num_experts=self.num_experts, top_k=self.top_k)

        def bind_forced_routing(self, job: Job) -> None:
            """Fill in what the strategy of a benchmark needs from the router and the job."""
            if self.forced_routing is None:
                return
            if self.num_expert_groups is not None:
                self.forced_routing.open_groups = self.num_limited_groups
            self.forced_routing.batch_cut = job.cut
            self.forced_routing.update_from_config(
                config=job.config, num_experts=self.num_experts, top_k=self.top_k
            )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config
        self.layer = config.layer
        self.aux_losses = RouterLosses(config.aux_losses)
        self.expert_bias = config.expert_bias.build() if config.expert_bias is not None else None
        self.forced_routing = (
            config.forced_routing.build() if config.forced_routing is not None else None
        )
        self.needs_step_counts = self.aux_losses.needs_step_counts or (
            self.expert_bias is not None and self.expert_bias.moves
        )
        self._needs_loop = self.needs_step_counts or len(self.aux_losses) > 0
        self.needs_tokens = False
        self.tokens: BatchTokens | None = None
        """Of the running forward, where batches say which tokens are valid or a loss asks for
        documents (:mod:`titan_moe_lb.balancing.valid_tokens.model_input`); None: all tokens are valid."""
        self.num_bins = self.expert_bias.num_bins if self.expert_bias is not None else 0
        self.replay: RouterReplay | None = None
        """Experts of an earlier forward that take the place of the choice."""
        self.saves_by_operator = False
        """The decision passes through an operator that a checkpointing policy saves."""
        self.held_out_counts_E: torch.Tensor | None = None
        """Where forwards that do not learn add their tokens, int64 ``(E,)``; None: nowhere."""
        self.record: RouterRecord | None = None
        self.step_record: StepRecord | None = None
        self.stage = 0
        """Pipeline stage of the layer."""
        self.actions: Sequence[Action] | None = None
        """What its pipeline rank does in a pass; None without pipeline parallelism."""

    def wire(self, groups: RankGroups) -> None:
        """Read the training loop of the config and the process groups. Once, before training."""
        padded = self.config.loop.padded
        self.aux_losses.wire(groups, padded=padded)
        self.needs_tokens = padded or self.aux_losses.num_documents > 1
        if self.forced_routing is not None:
            self.forced_routing.wire(groups, self.layer)

    def note_in(self, step_record: StepRecord, index: int) -> None:
        """Take the ``index``-th rows of the record of all routers of the rank."""
        self.step_record = step_record
        self.record = step_record.router(index, self.num_experts, self.top_k, self.num_bins)

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
        logits_BLE = in_float32(self.gate, x_BLD)
        tokens = squares_2 = None
        learns = self.training and (torch.is_grad_enabled() or self._model_learns)
        if learns:
            self._check_loop()
            if self.needs_tokens:
                with spmd.no_typecheck(), torch.no_grad():
                    tokens = saved_decision(self._kept_tokens)
            squares_2 = None if self.record is None else self.record.gradient_squares_2
            taught_BLE = logits_BLE if squares_2 is None else measured(logits_BLE, squares_2[1])
            taught_BLE = self.aux_losses.attach_to_logits(taught_BLE, self.record, tokens)
            logits_BLE = taught_BLE if squares_2 is None else measured(logits_BLE, squares_2[0])
        scores_BLE = self._score(logits_BLE)
        with spmd.no_typecheck(), torch.no_grad():
            local_scores_BLE = local_shard(scores_BLE)
            inverse_BL = self._inverse_sums(local_scores_BLE, tokens) if learns else None
            local_bias_E = None if expert_bias_E is None else local_shard(expert_bias_E)
            ids_BLK, coefficients_BE = saved_decision(
                lambda: self._decide(local_scores_BLE, local_bias_E, inverse_BL, tokens, learns)
            )
        topk_expert_ids_BLK = placed_as(scores_BLE, ids_BLK)
        document_BL = None if tokens is None else tokens.document_BL
        if squares_2 is not None:
            chosen_BLK = local_shard(scores_BLE).gather(-1, ids_BLK)
            second_BLE = local_shard(self._score(taught_BLE))
            chosen_BLK = taught(chosen_BLK, second_BLE, coefficients_BE, inverse_BL, document_BL)
        elif coefficients_BE is None:
            chosen_BLK = local_shard(scores_BLE).gather(-1, ids_BLK)
        else:
            chosen_BLK = gather_scores(
                local_shard(scores_BLE), ids_BLK, coefficients_BE, inverse_BL, document_BL
            )
        topk_scores_BLK = placed_as(scores_BLE, chosen_BLK)
        if self.route_norm:
            topk_scores_BLK = topk_scores_BLK / (topk_scores_BLK.sum(dim=-1, keepdim=True) + 1e-20)
        return topk_scores_BLK * self.route_scale, topk_expert_ids_BLK, scores_BLE

    def _check_loop(self) -> None:
        """Raises ``JobError``: nobody would close the step, or know its rows."""
        if self.step_record is None:
            if self._needs_loop:
                raise JobError(
                    f"layer {self.layer} trains with an expert bias or an aux loss, and no loop "
                    "closes its steps: call titan_moe_lb.attach(model, optimizer) before the first "
                    "forward"
                )
        elif self.step_record.of_copy:
            raise JobError(
                f"layer {self.layer} is of a copy of a model that has a training loop, and nobody "
                "closes the steps of the copy: copy the model before attach(), and attach() each "
                "that learns"
            )
        elif self.step_record.learns is False and len(self.aux_losses) and not is_recomputation():
            raise JobError(
                f"layer {self.layer} with an aux loss runs outside a forward of the model that "
                "attach() was given, so that its rows are not counted: call that model, or attach() "
                "the one that is called"
            )

    @property
    def _model_learns(self) -> bool:
        """The running forward of the whole model learns. Reentrant checkpointing runs a block
        without gradients in the forward, and with them in the backward."""
        return self.step_record is not None and self.step_record.learns is True

    def _score(self, logits_BLE: torch.Tensor) -> torch.Tensor:
        return SCORE_FUNCTIONS[self.score_func](logits_BLE)

    def _inverse_sums(
        self, scores_BLE: torch.Tensor, tokens: BatchTokens | None
    ) -> torch.Tensor | None:
        """What makes probabilities of the scores, where a loss needs it; 0 for padding."""
        if not self.aux_losses.needs_probabilities:
            return None
        if self.score_func == "softmax":  # whose sums are 1
            return None if tokens is None else tokens.valid_BL.float()
        inverse_BL = inverse_sums(scores_BLE)
        return inverse_BL if tokens is None else inverse_BL * tokens.valid_BL

    def _decide(
        self,
        scores_BLE: torch.Tensor,
        expert_bias_E: torch.Tensor | None,
        inverse_BL: torch.Tensor | None,
        tokens: BatchTokens | None,
        learns: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All that must not happen again when the forward is repeated. On local tensors.

        Returns:
            Expert ids ``(B, L, K)``, and the coefficients of the losses of sums.
        """
        ids_BLK = self._choose(scores_BLE, expert_bias_E, tokens, learns)
        if self.replay is not None:
            ids_BLK = self.replay(ids_BLK)
        ids_BLK = self._kept(ids_BLK)
        coefficients_BE = None
        if learns and self.record is not None:
            counts_SQE, counts_by_source = self._count(
                ids_BLK, scores_BLE, tokens, biased=expert_bias_E is not None
            )
            coefficients_BE = self.aux_losses.coefficients(
                scores_BLE, counts_by_source, inverse_BL, tokens, self.record, self._kept
            )
            if not is_recomputation():
                self.record.note(counts_SQE, ids_BLK)
        elif not learns and self.held_out_counts_E is not None:
            ids = ids_BLK.flatten()
            self.held_out_counts_E.index_add_(0, ids, torch.ones_like(ids))
        return ids_BLK, coefficients_BE

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, through an operator that a checkpointing policy saves, where it needs one."""
        return save_decision(tensor) if self.saves_by_operator else tensor

    def _kept_tokens(self) -> BatchTokens | None:
        """Those of the running forward: a repeated one may run after others have begun."""
        tokens = self.tokens
        if self.aux_losses.num_documents > 1 and (tokens is None or tokens.documents is None):
            raise JobError(
                'an aux loss has over = "document", and the batch does not say which tokens are '
                "of one document: call the whole model, with document_ids=..."
            )
        if tokens is not None and self.saves_by_operator:
            tokens = tokens.kept(self._kept)
        return tokens

    def _choose(
        self,
        scores_BLE: torch.Tensor,
        expert_bias_E: torch.Tensor | None,
        tokens: BatchTokens | None,
        learns: bool,
    ) -> torch.Tensor:
        """The experts of every token ``(B, L, K)``, int64."""
        if self.forced_routing is not None:
            assert self.record is not None, "forced routing needs a wired router"
            number = self.record.forward_number()
            return self.forced_routing(scores_BLE, number, self._limit_groups)
        if self._debug_force_load_balance:
            return self._debug_force_load_balance_routing(scores_BLE)[0]
        biased_BLE = scores_BLE if expert_bias_E is None else scores_BLE + expert_bias_E
        choice_BLE = self._limit_groups(biased_BLE)
        record, rule = self.record, self.expert_bias
        histogram_EH = None if record is None else record.histogram_EH
        if histogram_EH is None or not learns or is_recomputation():
            return choice_BLE.topk(self.top_k, dim=-1, sorted=False).indices
        assert record is not None and rule is not None and expert_bias_E is not None
        best_BLK1, ids_BLK1 = choice_BLE.topk(self.top_k + 1, dim=-1)
        required_BLE = required_bias(
            scores_BLE,
            biased_BLE,
            best_BLK1[..., -1:],
            num_groups=self.num_expert_groups,
            num_limited_groups=self.num_limited_groups,
        )
        number = record.one if tokens is None else tokens.valid_BL.unsqueeze(-1)
        rule.observe(histogram_EH, required_BLE, expert_bias_E, number.int())
        return ids_BLK1[..., : self.top_k].contiguous()

    def _limit_groups(self, choice_BLE: torch.Tensor) -> torch.Tensor:
        if self.num_expert_groups is None:
            return choice_BLE
        return self._get_node_limited_routing_scores(choice_BLE)

    def _count(
        self,
        ids_BLK: torch.Tensor,
        scores_BLE: torch.Tensor,
        tokens: BatchTokens | None,
        *,
        biased: bool,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Local tokens per source, sequence and expert: see :func:`counting.count`."""
        assert self.record is not None
        forced = self.forced_routing is not None or self._debug_force_load_balance

        def unbiased_ids_BLK() -> torch.Tensor:
            if biased or forced or self.num_expert_groups is not None:
                return scores_BLE.topk(self.top_k, dim=-1, sorted=False).indices
            return ids_BLK

        return counting.count(
            self.aux_losses.count_sources,
            ids_BLK,
            unbiased_ids_BLK,
            num_experts=self.num_experts,
            tokens=tokens,
            num_documents=self.aux_losses.num_documents,
            one=self.record.one,
        )


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

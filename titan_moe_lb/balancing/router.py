"""Router with losses and a record: a subclass of torchtitan's top-k router.

Shape suffixes as in torchtitan's ``models/common/moe.py``; L = local tokens of a sequence,
S = count sources, Q = sequences, which are rows or their documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torchtitan.models.common.moe import MoE, TokenChoiceTopKRouter
from torchtitan.protocols.module import ModuleDict

from titan_moe_lb.balancing import choice
from titan_moe_lb.balancing.expert_bias import ExpertBias
from titan_moe_lb.balancing.float32_gate import in_float32
from titan_moe_lb.balancing.forced_routing import ForcedRouting
from titan_moe_lb.balancing.losses.base import AuxLoss, LogitsLoss, SumsLoss
from titan_moe_lb.balancing.recording.recomputation import (
    save_no_decision,
    saved_decision,
)
from titan_moe_lb.balancing.recording.replayed import RouterReplay
from titan_moe_lb.balancing.recording.sequence_tables import CountSources, SequenceTables
from titan_moe_lb.balancing.recording.step_record import RouterRecord, StepRecord
from titan_moe_lb.balancing.recording.training_loop import TrainingLoop
from titan_moe_lb.balancing.score_functions import SCORE_FUNCTIONS
from titan_moe_lb.balancing.valid_tokens.batch_tokens import BatchTokens, token_weights
from titan_moe_lb.errors import JobError
from titan_moe_lb.functional import gather_scores
from titan_moe_lb.parallel.local_shard import local_shard, placed_as, untyped
from titan_moe_lb.parallel.rank_groups import RankGroups
from titan_moe_lb.parallel.schedules import Action
from titan_moe_lb.resolved_job import Job


class LoadBalancedRouter(TokenChoiceTopKRouter):
    """Token-choice top-k routing with auxiliary losses, forced routing and a record.

    Without losses and forced routing, the result equals ``TokenChoiceTopKRouter`` bit for bit.
    Records and losses are active only in training mode with gradients.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(TokenChoiceTopKRouter.Config):
        aux_losses: list[AuxLoss.Config] = field(default_factory=list)
        """Losses of the router, in the order of its record."""

        expert_bias: ExpertBias.Config | None = None
        """Rule that moves the bias of the choice; None for no bias."""

        forced_routing: ForcedRouting.Config | None = None
        """Strategy that replaces the choice by scores, in a benchmark."""

        is_anticipatory: bool = False
        """True if a Trainer gives the experts that older parameters chose."""

        frozen: frozenset[str] = frozenset()
        """Parts that do not learn: ``"gate"``, ``"bias"``, ``"losses"`` (``balancing/freezing.py``)."""

        layer: int = 0
        """Number of the router's layer in the whole model."""

        loop: TrainingLoop = field(default_factory=TrainingLoop)
        """Properties of the training loop's steps."""

        def bind(self, job: Job | None = None) -> None:
            """Fill in the numbers of the router and of the job.

            ``job`` is None for a training loop that announces its rows.
            """
            sizes = {"num_experts": self.num_experts, "top_k": self.top_k}
            rows = None if job is None else job.config.training.local_batch_size
            for loss in self.aux_losses:
                loss.bind(**sizes)
                loss.local_batch_size = rows
            if self.expert_bias is not None:
                self.expert_bias.bind(**sizes)
                self.expert_bias.score_func = self.score_func
            if self.forced_routing is not None and job is not None:
                if self.num_expert_groups is not None:
                    self.forced_routing.open_groups = self.num_limited_groups
                self.forced_routing.batch_cut = job.cut
                self.forced_routing.update_from_config(config=job.config, **sizes)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config
        self.layer = config.layer
        losses: list[AuxLoss] = [loss.build() for loss in config.aux_losses]
        for index, built in enumerate(losses):
            built.index = index
        self.aux_losses = ModuleDict({loss.type_name: loss for loss in losses})
        sums = [loss for loss in losses if isinstance(loss, SumsLoss)]
        off = "losses" in config.frozen
        self._counted = [loss for loss in sums if loss.needs_step_counts]
        self._of_sums = [] if off else sums
        self._of_logits = [one for one in losses if isinstance(one, LogitsLoss) and not off]
        self.num_documents = max([loss.config.documents or 1 for loss in self._of_sums], default=1)
        """Documents of a row that a loss distinguishes; 1 if every row is one sequence."""
        self.expert_bias = config.expert_bias and config.expert_bias.build()
        self.forced_routing = config.forced_routing and config.forced_routing.build()
        self.needs_step_counts = any(loss.needs_step_counts for loss in losses) or (
            self.expert_bias is not None and self.expert_bias.moves
        )
        self.needs_tokens = False
        self.tokens: BatchTokens | None = None
        """Tokens of the running forward (:mod:`titan_moe_lb.balancing.valid_tokens.model_input`);
        None: all tokens are valid."""
        self.num_bins = 0 if self.expert_bias is None else self.expert_bias.num_bins
        self.replay: RouterReplay | None = None
        """Replacement of the choice by experts of an earlier forward."""
        self.save: Callable[[torch.Tensor], torch.Tensor] = save_no_decision
        """Operator whose result a checkpointing policy saves; the policy sets it."""
        self.held_out_counts_E: torch.Tensor | None = None
        """Buffer for the tokens per expert of forwards that do not learn, int64 ``(E,)``."""
        self.record: RouterRecord | None = None
        self.step_record: StepRecord | None = None
        self.stage = 0  # pipeline stage of the layer
        self.actions: Sequence[Action] | None = None
        """Actions of its pipeline rank in one pass; None without pipeline parallelism."""

    def wire(self, groups: RankGroups) -> None:
        """Apply the config's training loop and the process groups, once before training."""
        self._groups = groups
        padded = self.config.loop.padded
        self.needs_tokens = padded or self.num_documents > 1
        at_once = [loss for loss in self._of_sums if loss.needs_counts]
        sources = [[loss.count_source for loss in some] for some in (self._counted, at_once)]
        self.sources = CountSources(*sources, padded=padded, num_documents=self.num_documents)
        self._whole_sums = not all(loss.linear for loss in self._of_sums)
        self._whole_counts = bool(at_once)
        for loss in self.aux_losses.values():
            loss.groups = groups
        for loss in (*self._counted, *at_once):
            loss.source = self.sources.index(loss.count_source)
        if self.forced_routing is not None:
            self.forced_routing.wire(groups, self.layer)

    def note_in(self, step_record: StepRecord, index: int) -> None:
        """Record in the ``index``-th rows of the rank's record."""
        self.step_record = step_record
        self.record = step_record.router(index, self.num_experts, self.top_k, self.num_bins)

    def forward(
        self, x_BLD: torch.Tensor, expert_bias_E: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Choose the experts of every token, and attach the losses to the scores.

        Args:
            x_BLD: input ``(B, L, D)``.
            expert_bias_E: bias of the selection, not of the scores ``(E,)``.

        Returns:
            Routing scores ``(B, L, K)``, expert ids ``(B, L, K)`` int64, and the full
            scores ``(B, L, E)``.
        """
        logits_BLE = with_losses_BLE = in_float32(self.gate, x_BLD)
        learns, tokens = self._learns, None
        if learns:
            self._check_loop()
            if self.needs_tokens:
                with untyped(), torch.no_grad():
                    tokens = saved_decision(self._saved_tokens)
            with_losses_BLE = self.attach_losses(logits_BLE, tokens)
        scores_BLE = SCORE_FUNCTIONS[self.score_func](with_losses_BLE)
        with untyped():
            local_BLE, inverse_BL = local_shard(scores_BLE), None
            with torch.no_grad():
                if learns and self._of_sums:
                    inverse_BL = token_weights(self.score_func, local_BLE, tokens)
                bias_E = None if expert_bias_E is None else local_shard(expert_bias_E)
                ids_BLK, coefficients_BE = saved_decision(
                    lambda: self._decide(
                        (x_BLD, logits_BLE), local_BLE, bias_E, inverse_BL, tokens, learns
                    )
                )
            document_BL = None if tokens is None else tokens.document_BL
            own_BLE, chosen_BLK = self.gather(
                logits_BLE, local_BLE, ids_BLK, coefficients_BE, inverse_BL, document_BL
            )
        topk_scores_BLK = placed_as(scores_BLE, chosen_BLK)
        if own_BLE is not local_BLE:
            scores_BLE = placed_as(scores_BLE, own_BLE)
        if self.route_norm:
            topk_scores_BLK = topk_scores_BLK / (topk_scores_BLK.sum(dim=-1, keepdim=True) + 1e-20)
        return topk_scores_BLK * self.route_scale, placed_as(scores_BLE, ids_BLK), scores_BLE

    def attach_losses(self, logits_BLE: torch.Tensor, tokens: BatchTokens | None) -> torch.Tensor:
        """Attach the gradients of the losses of logits to the logits."""
        local_BLE = local_shard(logits_BLE)
        if not self._of_logits or not local_BLE.numel():
            return logits_BLE
        assert self.record is not None
        with untyped():
            for loss in self._of_logits:
                local_BLE = loss.attach(local_BLE, tokens, self.record)
        return placed_as(logits_BLE, local_BLE)

    def gather(
        self,
        logits_BLE: torch.Tensor,
        scores_BLE: torch.Tensor,
        ids_BLK: torch.Tensor,
        coefficients_BE: torch.Tensor | None,
        *losses: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather the local scores of the chosen experts, and attach the losses of sums.

        ``logits_BLE`` are without losses; ``GradientNorms`` alone needs them. ``losses`` are the
        last arguments of ``functional.gather_scores``; coefficients are None without a loss of sums.

        Returns:
            The scores of all experts ``(B, L, E)``, and of the chosen ones ``(B, L, K)``.
        """
        if coefficients_BE is None:
            return scores_BLE, scores_BLE.gather(-1, ids_BLK)
        return scores_BLE, gather_scores(scores_BLE, ids_BLK, coefficients_BE, *losses)

    def _check_loop(self) -> None:
        """Raise ``JobError`` without a training loop that closes the steps and knows their rows."""
        if self.step_record is not None:
            self.step_record.check_forward(self.layer)
        elif self.needs_step_counts or len(self.aux_losses):
            raise JobError(
                f"layer {self.layer} trains with an expert bias or an aux loss, and no loop "
                "closes its steps: call titan_moe_lb.attach(model, optimizer) before the first "
                "forward"
            )

    @property
    def _learns(self) -> bool:
        """True in a forward that learns, even if a checkpoint disables gradients."""
        model_learns = self.step_record is not None and self.step_record.learns is True
        return self.training and (torch.is_grad_enabled() or model_learns)

    def _saved_tokens(self) -> BatchTokens | None:
        """Save the tokens of the running forward, for a recomputation after others have begun."""
        tokens = self.tokens
        if self.num_documents > 1 and (tokens is None or tokens.documents is None):
            raise JobError(
                'an aux loss has over = "document", and the batch has no document numbers: '
                "pass document_ids=... to the whole model"
            )
        return None if tokens is None else tokens.saved(self.save)

    def _decide(
        self,
        of_gate: tuple[torch.Tensor, torch.Tensor],
        scores_BLE: torch.Tensor,
        expert_bias_E: torch.Tensor | None,
        inverse_BL: torch.Tensor | None,
        tokens: BatchTokens | None,
        learns: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run everything that a recomputed forward must not repeat, on local tensors.

        ``of_gate`` contains the gate's input and logits, which may be distributed.
        """
        chosen = choice.choose(self, scores_BLE, expert_bias_E, tokens, learns)
        ids_BLK = self.save(chosen.expert_ids_BLK)
        coefficients_BE, record = None, self.record
        if learns and record is not None:
            if record.scores is not None and choice.records_scores(self):
                x_BLD, logits_BLE = map(local_shard, of_gate)
                gate = self.score_func, self.gate.weight.dtype, x_BLD, logits_BLE
                record.scores.add(*gate, scores_BLE, inverse_BL, chosen, tokens)
            counts_by_source = self.sources.count(
                ids_BLK,
                lambda: choice.unbiased(self, scores_BLE, expert_bias_E, ids_BLK),
                tokens,
                record,
            )
            coefficients_BE = self._coefficients(
                scores_BLE, counts_by_source, inverse_BL, tokens, record
            )
        elif not learns:
            self._count_held_out(ids_BLK)
        return ids_BLK, coefficients_BE

    def _count_held_out(self, ids_BLK: torch.Tensor) -> None:
        """Count the tokens of a forward that does not learn, in an evaluation that reads them."""
        if self.held_out_counts_E is not None:
            ids = ids_BLK.flatten().long()
            self.held_out_counts_E.index_add_(0, ids, torch.ones_like(ids))

    def _coefficients(
        self,
        scores_BLE: torch.Tensor,
        counts_by_source: list[torch.Tensor | None],
        inverse_BL: torch.Tensor | None,
        tokens: BatchTokens | None,
        record: RouterRecord,
    ) -> torch.Tensor | None:
        """Compute the weighted gradient of the losses of sums in the probability sums, float32.

        Returns:
            ``(B, E)`` or ``(1, E)``, with documents ``(B, D, E)``; None without a loss or a token.
        """
        if not self._of_sums or not scores_BLE.numel():
            return None
        documents = self.num_documents > 1
        tables = SequenceTables(
            scores_BLE,
            inverse_BL,
            counts_by_source,
            tokens,
            num_documents=self.num_documents,
            groups=self._groups,
            whole_sums=self._whole_sums,
            whole_counts=self._whole_counts,
        )
        total = None
        for loss in self._of_sums:
            coefficients_BE = loss.contribute(tables, record, self.save)
            if documents:  # (B, D, E), or broadcasting to it
                shape = (-1, 1) if loss.config.documents is None else (len(scores_BLE), -1)
                coefficients_BE = coefficients_BE.unflatten(0, shape)
            weight = record.weights_A.select(0, loss.index)
            if total is None:
                total = coefficients_BE * weight
            else:
                total = torch.addcmul(total, coefficients_BE, weight)
        assert total is not None
        return total.expand(len(scores_BLE), self.num_documents, -1) if documents else total


def router_configs(config: Any) -> dict[str, LoadBalancedRouter.Config]:
    """Find the routers of a model config or a ``Trainer.Config``, by their names in it."""
    return {fqn: router for fqn, router, *_ in config.traverse(LoadBalancedRouter.Config)}


def moe_layers_of(model_parts: list[nn.Module]) -> list[MoE]:
    """Find the balanced MoE layers of this rank's pipeline stages."""
    modules = [module for part in model_parts for module in part.modules()]
    layers = [module for module in modules if isinstance(module, MoE)]
    return [layer for layer in layers if isinstance(layer.router, LoadBalancedRouter)]


def routers_of(model_parts: list[nn.Module]) -> list[LoadBalancedRouter]:
    """Find the routers of this rank's pipeline stages."""
    modules = [module for part in model_parts for module in part.modules()]
    return [module for module in modules if isinstance(module, LoadBalancedRouter)]

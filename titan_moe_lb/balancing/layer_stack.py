"""Stacks of similar layers of a rank, whose biases and losses are updated together."""

from __future__ import annotations

from typing import Any

import torch

from titan_moe_lb.balancing.expert_bias import BiasStep
from titan_moe_lb.balancing.recording.step_record import StepRecord, histogram_of
from titan_moe_lb.balancing.router import LoadBalancedRouter
from titan_moe_lb.parallel.local_shard import local_shard


class LayerStack:
    """Layers with the same number of experts, the same top_k and the same bias rule.

    The number of operators does not depend on the number of layers.
    """

    def __init__(self, layers: list[Any], members: list[int], record: StepRecord) -> None:
        """Stack some layers of a rank.

        ``members`` are indices in ``layers``, which has all balanced MoE layers of the rank in the
        order of the record.
        """
        self._layers = [layers[index] for index in members]
        self._routers: list[LoadBalancedRouter] = [layer.router for layer in self._layers]
        self._members = members
        self._record = record
        self._rows: slice | torch.Tensor = slice(None)
        if len(members) < len(layers):
            self._rows = torch.tensor(members, device=record.counts_NMSE.device)
        self._first = self._routers[0]

    def move_bias(self, step: int, tokens: int) -> None:
        """Update the biases from the sums of the finished step.

        Arguments as in :meth:`ExpertBias.set_progress`.
        """
        rule = self._first.expert_bias
        if rule is None or not rule.moves:
            return
        rule.set_progress(step, tokens)
        biases = [local_shard(layer.expert_bias_E) for layer in self._layers]
        state = {
            name: [local_shard(getattr(router.expert_bias, name)) for router in self._routers]
            for name in rule.state_names
        }
        histogram_NEH, num_bins = None, self._first.num_bins
        if num_bins and self._record.histogram_NEH is not None:
            table_NEH = self._record.histogram_NEH[self._rows]
            histogram_NEH = histogram_of(table_NEH, self._first.num_experts, num_bins)
        step_of_rule = BiasStep(
            bias_NE=torch.stack(biases),
            counts_NE=self._counts(self._first.sources.valid),
            histogram_NEH=histogram_NEH,
            state={name: torch.stack(rows) for name, rows in state.items()},
        )
        delta_NE = rule.move(step_of_rule)
        torch._foreach_add_(biases, delta_NE.unbind())
        for name, rows in state.items():
            torch._foreach_copy_(rows, step_of_rule.state[name].unbind())
        for index, delta_E in zip(self._members, delta_NE.unbind(), strict=True):
            self._record.bias_delta_N[index] = delta_E

    def finish_losses(self, *, skipped: bool = False) -> None:
        """Update the losses with the counts of the step, or drop those of a skipped step."""
        for name, loss in self._first.aux_losses.items():
            losses = [router.aux_losses[name] for router in self._routers]
            if not loss.needs_step_counts:
                loss.finish_step(losses, None)
            elif not skipped:
                loss.finish_step(losses, self._counts(loss.source))

    def _counts(self, source: int) -> torch.Tensor:
        assert self._record.sums is not None
        return self._record.sums.counts_NSE[self._rows, source, : self._first.num_experts]


def stacks_of(layers: list[Any], record: StepRecord) -> list[LayerStack]:
    """Group the layers of a rank into stacks of similar layers."""
    kinds: list[tuple] = []
    members: list[list[int]] = []
    for index, layer in enumerate(layers):
        router = layer.router.config
        kind = (router.num_experts, router.top_k, router.expert_bias)
        if kind not in kinds:
            kinds.append(kind)
            members.append([])
        members[kinds.index(kind)].append(index)
    return [LayerStack(layers, indices, record) for indices in members]

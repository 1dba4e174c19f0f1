"""What happens when the optimizer steps: the record is closed, the bias moves, losses take counts."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.distributed import ParallelDims
from torchtitan.models.common.moe import MoE
from torchtitan.tools.logging import logger

from titan_moe_lb.expert_bias import BiasStep
from titan_moe_lb.parallel import layout
from titan_moe_lb.parallel.local_shard import local_shard
from titan_moe_lb.recording.step_record import StepRecord
from titan_moe_lb.router import LoadBalancedRouter, moe_layers_of, routers_of
from titan_moe_lb.valid_tokens.model_input import hand_on_tokens


def register_load_balancing(
    optimizers: OptimizersContainer, model_parts: list[nn.Module], parallel_dims: ParallelDims
) -> None:
    """A ``ModelSpec.post_optimizer_build_fn``: the expert bias, and our records.

    Wires the routers, and closes the recorded step just before the optimizer steps,
    after the last micro-batch of the step has run. It stands in for torchtitan's own bias
    update, whose counts are doubled by activation checkpointing and miss the layers of
    multi-token prediction; both would reduce the same counts.
    """
    for part in model_parts:
        hand_on_tokens(part, routers_of([part]), parallel_dims)
    layers = moe_layers_of(model_parts)
    if not layers:
        return
    routers: list[LoadBalancedRouter] = [layer.router for layer in layers]  # type: ignore[misc]
    record = wire(routers, parallel_dims)
    _announce_forced_routing(routers)
    if record is None:
        return
    hook = StepHook(layers, record, layout.token_groups(parallel_dims))
    optimizers.register_step_pre_hook(lambda *args, **kwargs: hook.close_step())


def wire(routers: list[LoadBalancedRouter], parallel_dims: ParallelDims) -> StepRecord | None:
    """Give the routers of a rank one record, and the process groups. Once, before training.

    Returns:
        The record; None where nothing asks for one.
    """
    config = routers[0].config
    losses = routers[0].aux_losses
    by_micro_batch = (
        config.track or config.recorded_tokens is not None or config.forced_routing is not None
    )
    if not (by_micro_batch or len(losses) or routers[0].needs_step_counts):
        return None
    record = StepRecord(
        num_routers=len(routers),
        num_micro_batches=config.num_micro_batches if by_micro_batch else 1,
        num_sources=losses.num_step_sources,
        num_experts=config.num_experts,
        num_losses=len(losses),
        num_bins=0 if config.forced_routing is not None else routers[0].num_bins,
        token_shape=(*config.recorded_tokens, config.top_k) if config.recorded_tokens else None,
        device=local_shard(routers[0].gate.weight).device,
        finished_steps=config.finished_steps,
    )
    for index, router in enumerate(routers):
        router.wire(record, index, parallel_dims)
    return record


class StepHook:
    """Closes the steps of a rank's MoE layers. The number of operators does not depend on
    how many layers there are."""

    def __init__(
        self, layers: list[MoE], record: StepRecord, token_groups: list[dist.ProcessGroup]
    ) -> None:
        """
        Args:
            record: of the routers of these layers, in this order.
            token_groups: of the mesh axes whose ranks route different tokens.
        """
        self._layers = layers
        self._routers: list[LoadBalancedRouter] = [layer.router for layer in layers]  # type: ignore[misc]
        self._record = record
        self._token_groups = token_groups
        self._finished_steps = self._routers[0].config.finished_steps
        self._weights: list[float] | None = None
        self._set_weights()

    def close_step(self) -> None:
        """The optimizer is about to step. Collective over the token groups."""
        with torch.no_grad():
            self._record.finish_step()
            if self._routers[0].needs_step_counts:
                self._record.reduce(self._token_groups)
                self._record.forget_histogram()
            self._move_bias()
            self._finish_losses()
            # Counted by torchtitan's MoE.forward, and read by nobody here.
            torch._foreach_zero_([local_shard(layer.tokens_per_expert_E) for layer in self._layers])
        self._finished_steps += 1
        self._set_weights()

    def _move_bias(self) -> None:
        rule = self._routers[0].expert_bias
        if rule is None or not rule.moves:
            return
        assert self._record.sums is not None
        rule.set_progress(self._finished_steps + 1, self._tokens_seen)
        sums = self._record.sums
        biases = [local_shard(layer.expert_bias_E) for layer in self._layers]
        state = {
            name: [local_shard(getattr(router.expert_bias, name)) for router in self._routers]
            for name in rule.state_names
        }
        losses = self._routers[0].aux_losses
        step = BiasStep(
            bias_NE=torch.stack(biases),
            counts_NE=sums.counts_NSE[:, losses.valid_source],
            histogram_NEH=sums.histogram_NEH,
            state={name: torch.stack(rows) for name, rows in state.items()},
        )
        delta_NE = rule.delta(step)
        if self._routers[0].config.padded:  # a step without a valid token moves nothing
            taught_N1 = step.counts_NE.sum(dim=-1, keepdim=True) > 0
            delta_NE = torch.where(taught_N1, delta_NE, 0)
            for name, rows in state.items():
                step.state[name] = torch.where(taught_N1, step.state[name], torch.stack(rows))
        torch._foreach_add_(biases, delta_NE.unbind())
        for name, rows in state.items():
            torch._foreach_copy_(rows, step.state[name].unbind())
        self._record.bias_delta_NE = delta_NE

    def _finish_losses(self) -> None:
        losses = self._routers[0].aux_losses
        for name, loss in losses.items():
            counts_NE = None
            if loss.needs_step_counts:
                assert self._record.sums is not None
                counts_NE = self._record.sums.counts_NSE[:, losses.source_index(loss)]
            loss.finish_step([router.aux_losses[name] for router in self._routers], counts_NE)

    def _set_weights(self) -> None:
        """The weights of the step that begins: a copy to the device where they change."""
        weights = [
            loss.weight_at(self._finished_steps + 1, self._tokens_seen)
            / self._routers[0].config.token_replicas
            for loss in self._routers[0].aux_losses.values()
        ]
        if weights != self._weights:
            self._weights = weights
            self._record.weights_A.copy_(torch.tensor(weights))

    @property
    def _tokens_seen(self) -> int:
        return self._finished_steps * self._routers[0].config.tokens_per_step


def _announce_forced_routing(routers: list[LoadBalancedRouter]) -> None:
    strategies = {
        router.forced_routing.config.describe()
        for router in routers
        if router.forced_routing is not None
    }
    for strategy in strategies:
        logger.warning(
            f"FORCED ROUTING: {strategy} decides where tokens go in {len(routers)} MoE layers. "
            "This run is a benchmark: its model is not worth keeping"
        )

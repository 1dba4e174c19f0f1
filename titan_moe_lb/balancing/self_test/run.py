"""Forwards, backwards and the one step of a self-test.

Losses are measured by difference: the gradient at a gate with one loss at weight 1, less the gradient
with all weights 0. Both forwards have the same random numbers and choose the same experts. So the
test needs nothing of the loop's own loss, and is exact for any weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from titan_moe_lb.balancing.hash_router import is_hash_router
from titan_moe_lb.balancing.self_test.faults import STEPS
from titan_moe_lb.balancing.self_test.measured import (
    BiasMeasured,
    GateOutput,
    LayerMeasured,
    LossMeasured,
    ModelMeasured,
    max_violation,
)
from titan_moe_lb.balancing.self_test.optimizers import each, gate_state
from titan_moe_lb.balancing.self_test.unchanged import same_random_numbers, unchanged
from titan_moe_lb.balancing.step_hook import StepHook
from titan_moe_lb.errors import JobError
from titan_moe_lb.parallel.local_shard import local_shard

Gradients = list[torch.Tensor | None]
"""Gradient of each gate, flat, in the order of the layers; None without one."""


def measure(
    parts: list[nn.Module],
    hook: StepHook,
    forward_backward: Callable[[], Any],
    optimizer: Any = None,
) -> ModelMeasured:
    """Measure the losses and biases of a rank's layers, and leave everything as it was.

    Args:
        parts: model parts of the rank.
        hook: step hook of the rank.
        forward_backward: function that runs one forward and its backward.
        optimizer: optimizer that the loop steps, or a sequence of them; None: the loop closes the
            steps itself.

    Raises:
        JobError: no layer has a loss or a bias.
    """
    if not hook.losses and all(layer.expert_bias_E is None for layer in hook.layers):
        raise JobError(
            "the model has no aux loss and no expert bias to check: set aux_losses or expert_bias"
        )
    with unchanged(parts, hook):
        return _Test(parts, hook, forward_backward, each(optimizer)).run()


class _Test:
    """Self-test of a rank."""

    def __init__(
        self,
        parts: list[nn.Module],
        hook: StepHook,
        forward_backward: Callable[[], Any],
        optimizers: list[Any],
    ) -> None:
        self._parameters = [p for part in parts for p in part.parameters()]
        self._hook, self._layers = hook, hook.layers
        self._forward_backward, self._optimizers = forward_backward, optimizers
        self._rows = 0
        self._counts: list[torch.Tensor] = []
        self._outputs: dict[int, GateOutput] = {}

    def run(self) -> ModelMeasured:
        """Run all forwards; only the static part if a dtype is wrong, which a forward refuses."""
        found = ModelMeasured(layers=[self._static(layer) for layer in self._layers])
        is_wrong = torch.tensor(
            int(any(layer.wrong_dtypes for layer in found.layers)),
            device=self._parameters[0].device,
        )
        for group in self._hook.groups.loop:  # so that no rank waits for another
            dist.all_reduce(is_wrong, op=dist.ReduceOp.MAX, group=group)
        if is_wrong:
            return found
        main = self._observed_main(found)
        biases = [None if b is None else local_shard(b).clone() for b in self._biases()]
        found.closed_steps = self._close()
        for row, layer in enumerate(found.layers):
            layer.bias = self._bias(row, biases[row])
        deltas = [
            None if bias is None or before is None else local_shard(bias) - before
            for bias, before in zip(self._biases(), biases, strict=True)
        ]
        self._set_biases(biases)
        self._measure_losses(found, main)
        self._probe_biases(found, biases, deltas)
        return found

    def _static(self, layer: Any) -> LayerMeasured:
        router = layer.router
        states = [*layer.named_buffers(recurse=False), *router.aux_losses.named_buffers()]
        if router.expert_bias is not None:
            states += router.expert_bias.named_buffers()
        in_optimizer, rate = gate_state(router.gate, self._optimizers)
        return LayerMeasured(
            layer=router.layer,
            frozen=router.config.frozen,
            gate_learns=any(p.requires_grad for p in router.gate.parameters()),
            in_optimizer=in_optimizer,
            learning_rate=rate,
            wrong_dtypes=[
                f"{name} ({str(buffer.dtype).removeprefix('torch.')})"
                for name, buffer in states
                if buffer.is_floating_point() and buffer.dtype != torch.float32
            ],
            evens_out=router.top_k == router.num_experts,
        )

    def _observed_main(self, found: ModelMeasured) -> Gradients:
        """Run the model's own loss alone, and note counts and outputs of the gates."""
        handles = [
            layer.router.gate.register_forward_hook(
                lambda _gate, _args, out, row=row: self._note_output(row, out)
            )
            for row, layer in enumerate(self._layers)
        ]
        try:
            main = self._gradients(weights=None)
        finally:
            for handle in handles:
                handle.remove()
        found.counted_forwards = self._hook.record.forwards
        for row, layer in enumerate(found.layers):
            layer.gate_output = self._outputs.get(row)
            router = self._layers[row].router
            if not (router.route_norm and router.top_k == 1):
                layer.main_norm = _norm(main[row])
            layer.uneven = max_violation(self._counts[row])
        return main

    def _note_output(self, row: int, out: torch.Tensor) -> None:
        if torch.compiler.is_compiling():  # one graph for each layer would exceed dynamo's limit
            return
        values = local_shard(out.detach())
        in_unit = (values >= 0).all() & (values <= 1).all() & (values.amax() > values.amin())
        self._outputs[row] = GateOutput(attached=out.requires_grad, looks_scored=bool(in_unit))

    def _gradients(self, weights: torch.Tensor | None) -> Gradients:
        """Run one forward and backward; the step stays open.

        Args:
            weights: factor of the gradient of each loss; None: 0.
        """
        hook = self._hook
        hook.skip_step()
        hook.begin_step(self._rows_of_step())
        hook.record.weights_A.copy_(torch.zeros(len(hook.losses)) if weights is None else weights)
        for parameter in self._parameters:
            parameter.grad = None
        with same_random_numbers():
            self._forward_backward()
        self._rows = hook.record.rows or self._rows
        self._counts = [
            hook.record.counts_NMSE[row, :, 0, : layer.router.num_experts].sum(0)
            for row, layer in enumerate(self._layers)
        ]
        for group in hook.groups.tokens:  # so that every rank finds the same
            for counts_E in self._counts:
                dist.all_reduce(counts_E, group=group)
        gates = [list(layer.router.gate.parameters()) for layer in self._layers]
        return [_flat([p.grad for p in parameters]) for parameters in gates]

    def _rows_of_step(self) -> int:
        """Return the rows of a step: those of the job or the loop, else those of the function."""
        return self._hook.rows_of_every_step or self._rows * self._hook.groups.batch.size or 2**40

    def _close(self) -> int | None:
        """Step the optimizers without gradients; count the steps of the balance that end."""
        for parameter in self._parameters:
            parameter.grad = None
        hook = self._hook
        hook.record.rows = 0  # the rows of the function may be a part of those of a step
        before, tokens = hook.finished_steps, hook.tokens.total
        for optimizer in self._optimizers:
            optimizer.step()
        closed = hook.finished_steps - before
        if not closed:
            hook.close_step()
        # The other forwards are of the same step: its weights, its forced choices.
        hook.tokens.read()
        hook.resume(before, tokens)
        return closed if self._optimizers else None

    def _biases(self) -> list[torch.Tensor | None]:
        return [layer.expert_bias_E for layer in self._layers]

    def _set_biases(self, values: list[torch.Tensor | None]) -> None:
        with torch.no_grad():
            for bias, value in zip(self._biases(), values, strict=True):
                if bias is not None and value is not None:
                    local_shard(bias).copy_(value)

    def _bias(self, row: int, before_E: torch.Tensor | None) -> BiasMeasured | None:
        """Compare the bias of a layer after the step with the update of its rule."""
        layer = self._layers[row]
        rule = layer.router.expert_bias
        if rule is None or before_E is None:
            return None
        delta_E = self._hook.record.bias_delta_N[row] if rule.moves else None
        if delta_E is None:
            delta_E = torch.zeros_like(before_E)
        foreign_E = local_shard(layer.expert_bias_E) - (before_E + delta_E)
        return BiasMeasured(
            rule=rule.type_name,
            moves=rule.moves,
            delta=float(delta_E.abs().max()),
            foreign=float(foreign_E.abs().max()),
            reads=True,
            moved_share=1.0,
            chooses_alone=False,
        )

    def _measure_losses(self, found: ModelMeasured, main: Gradients) -> None:
        hook = self._hook
        again = self._gradients(weights=None)
        noise = [_norm(_difference(one, other)) for one, other in zip(main, again, strict=True)]
        hook.weights = None
        hook.begin_step(self._rows_of_step())
        now = hook.record.weights_A.clone()
        for index, loss in enumerate(hook.losses):
            weight = loss.weight_at(hook.finished_steps + 1, hook.tokens.total)
            scale = float(now[index]) / weight if weight else 0.0
            unit = torch.zeros(len(hook.losses))
            unit[index] = scale
            attached = self._gradients(weights=unit) if scale else again
            for row, layer in enumerate(found.layers):
                if is_hash_router(self._layers[row].router.config):
                    continue
                norm = _norm(_difference(attached[row], again[row]))
                reaches = norm > 3 * noise[row] + 1e-6 * layer.main_norm
                norm = weight * norm if reaches else 0.0
                layer.losses.append(
                    LossMeasured(
                        name=loss.type_name,
                        weight=weight,
                        norm=norm,
                        share=norm / layer.main_norm if layer.main_norm else norm and math.inf,
                        reaches=reaches,
                    )
                )

    def _probe_biases(
        self,
        found: ModelMeasured,
        biases: list[torch.Tensor | None],
        deltas: list[torch.Tensor | None],
    ) -> None:
        """Change the biases, and see which choices follow."""
        if all(bias is None for bias in biases):
            return
        before = [counts.clone() for counts in self._counts]
        experts = [int(counts.argmin()) for counts in before]
        self._set_biases([_raised(b, e) for b, e in zip(biases, experts, strict=True)])
        self._gradients(weights=None)
        for row, layer in enumerate(found.layers):
            if layer.bias is not None:
                tokens = before[row].sum() / self._layers[row].router.top_k
                layer.bias.reads = bool(self._counts[row][experts[row]] >= 0.99 * tokens)
        self._set_biases(
            [None if b is None else b + STEPS * d for b, d in zip(biases, deltas, strict=True)]  # type: ignore[operator]
        )
        self._gradients(weights=None)
        for row, layer in enumerate(found.layers):
            if layer.bias is not None:
                moved = (self._counts[row] - before[row]).abs().sum() / 2
                layer.bias.moved_share = float(moved / before[row].sum().clamp_min(1))
        alike = [int((counts > 0).sum()) for counts in before]
        self._set_biases([None if b is None else torch.zeros_like(b) for b in biases])
        self._gradients(weights=None)
        for row, layer in enumerate(found.layers):
            if layer.bias is not None:
                same = alike[row] == self._layers[row].router.top_k and not layer.evens_out
                layer.bias.chooses_alone = same and int((self._counts[row] > 0).sum()) > alike[row]


def _raised(bias_E: torch.Tensor | None, expert: int) -> torch.Tensor | None:
    """Raise the bias of one expert above all scores."""
    if bias_E is None:
        return None
    raised_E = bias_E.clone()
    raised_E[expert] += 1e3 * (1 + float(bias_E.abs().max()))
    return raised_E


def _flat(gradients: list[torch.Tensor | None]) -> torch.Tensor | None:
    """Join the gradients of a gate, whole and in float64; None without one."""
    whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients if g is not None]
    return torch.cat([g.detach().double().flatten() for g in whole]) if whole else None


def _difference(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one - other


def _norm(gradient: torch.Tensor | None) -> float:
    return 0.0 if gradient is None else float(gradient.norm())

"""Expert load of any PyTorch MoE model, counted by hooks; nothing is balanced or changed."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from titan_moe_lb.balancing.recording.recomputation import is_recomputation
from titan_moe_lb.balancing.router import moe_layers_of
from titan_moe_lb.errors import JobError
from titan_moe_lb.functional import add_tokens_
from titan_moe_lb.telemetry.sink_metrics import sink_metrics
from titan_moe_lb.traces.load_trace import LoadTrace
from titan_moe_lb.traces.step_load import StepLoad

ExpertIds = Callable[[nn.Module, Any], torch.Tensor]
"""Function from a router and the output of its forward to the ids of the chosen experts, integers
``(..., K)``."""


def observe(
    model: nn.Module,
    run_dir: Path | str | None = None,
    *,
    routers: str | None = None,
    expert_ids: ExpertIds | None = None,
    num_experts: int | None = None,
    ep: int = 1,
    group: dist.ProcessGroup | None = None,
) -> Observation:
    """Count the tokens per expert of every training forward, until the observation is closed.

    Call it before the model is compiled, and :meth:`Observation.step` after each optimizer step. A
    forward in evaluation mode, and one that activation checkpointing repeats, are not counted.

    Args:
        model: model with routers, as those of transformers 5: modules with ``top_k`` that return
            the ids of the chosen experts, or logits of which the largest are chosen. It may be
            wrapped by DDP or FSDP.
        run_dir: folder of the trace, written by rank 0; None for no trace.
        routers: pattern of the routers' names, as in ``"*.mlp.gate"``; default: modules called
            ``gate`` or ``router`` with ``top_k``.
        expert_ids: see :data:`ExpertIds`; default: the integer tensor of the output, else the top-K
            of its last tensor.
        num_experts: experts of a layer; default: ``num_experts`` of the router, else the rows of
            its weight.
        ep: expert-parallel degree, for ``diagnose``.
        group: ranks that hold different tokens; default: all. With tensor parallelism, the
            data-parallel ranks.

    Raises:
        JobError: no router is found, or this package balances the model already.
    """
    if any(moe_layers_of([model])):
        raise JobError("the model has routers of titan_moe_lb: attach() it, and read its metrics()")
    found = {
        name: module
        for name, module in model.named_modules()
        if (
            fnmatch.fnmatch(name, routers)
            if routers is not None
            else name.rpartition(".")[2] in ("gate", "router") and hasattr(module, "top_k")
        )
    }
    if not found:
        pattern = "gate or router with top_k" if routers is None else routers
        raise JobError(
            f'no module of the model is a router ({pattern}): name them, as in routers="*.mlp.gate"'
        )
    layers = [
        _ObservedRouter(number, name, module, expert_ids or _chosen, num_experts)
        for number, (name, module) in zip(_numbers(list(found)), found.items(), strict=True)
    ]
    config = getattr(model, "config", None)
    name = getattr(config, "model_type", None) or type(model).__name__
    return Observation(layers, name, run_dir, ep, group)


class Observation:
    """Counts of a model's routers; :func:`observe` creates it."""

    def __init__(
        self,
        routers: list[_ObservedRouter],
        model: str,
        run_dir: Path | str | None,
        ep: int,
        group: dist.ProcessGroup | None,
    ) -> None:
        """Begin to count."""
        self._routers, self._model, self._run_dir = routers, model, run_dir
        self._ep, self._group = ep, group
        self._trace: LoadTrace | None = None
        self._last_step: int | None = None
        self._has_run = False
        self._names: frozenset[str] | None = None

    def step(self, step: int, **numbers: float) -> dict[str, float]:
        """Close an optimizer step: sum its counts over the ranks, and write them to the trace.

        Collective: call it on every rank. A step without a token is not written.

        Args:
            step: number of the step, larger than the last one.
            **numbers: further numbers of the step for the trace, such as ``loss``.

        Returns:
            The metrics of the loads, as :meth:`titan_moe_lb.Balance.metrics` names them; empty for
            a step without a token.

        Raises:
            JobError: the step is not larger than the last, a number is new since the first step,
                ranks have different routers, as stages of a pipeline do, or no router has run since
                :func:`observe`.
        """
        self._check(step, frozenset(numbers))
        experts = max(router.num_experts for router in self._routers)
        table = torch.stack([router.finished(experts) for router in self._routers])
        ranks = 1
        if dist.is_initialized():
            dist.all_reduce(table, group=self._group)
            ranks = dist.get_world_size(self._group)
        counts_ME, forwards = table[:, :experts].cpu().numpy(), table[:, experts]
        if not self._has_run and not forwards.any():
            raise JobError(
                "no router has run since observe(): observe() the model before its first compiled "
                "forward, and train the same model, in train()"
            )
        self._has_run = True
        if not counts_ME.any():
            return {}
        layers = tuple(router.number for router in self._routers)
        first = not dist.is_initialized() or dist.get_rank() == 0
        if self._run_dir is not None and first:
            if self._trace is None:
                self._trace = LoadTrace(
                    self._run_dir,
                    top_k=self._routers[0].top_k,
                    ep=self._ep,
                    micro_batches=max(int(forwards[0]), ranks),
                    model=self._model,
                )
            sizes = [router.num_experts for router in self._routers]
            rows = [row_E[:size] for row_E, size in zip(counts_ME, sizes, strict=True)]
            values = {name: float(value) for name, value in numbers.items()}
            self._trace.write(step, dict(zip(layers, rows, strict=True)), **values)
        for row_E, router in zip(counts_ME, self._routers, strict=True):
            row_E[router.num_experts :] = -1
        return sink_metrics(StepLoad(layers=layers, counts_ME=counts_ME.astype(np.int64)), ())

    def _check(self, step: int, names: frozenset[str]) -> None:
        """Raise ``JobError`` on every rank, before one of them waits for the others."""
        if self._last_step is None and dist.is_initialized():
            mine = [(router.number, router.name, router.num_experts) for router in self._routers]
            every: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(every, mine)
            if any(other != mine for other in every):
                raise JobError(
                    "the ranks have different routers: stages of a pipeline cannot be observed"
                )
        if self._last_step is not None and step <= self._last_step:
            raise JobError(f"step {step} comes after step {self._last_step}: number steps upwards")
        self._names = names if self._names is None else self._names
        if new := names - self._names:
            raise JobError(
                f"step {step} has {min(new)!r}, and the first step did not: pass the same numbers in "
                "every step, or NaN"
            )
        self._last_step = step

    def close(self) -> None:
        """Remove the hooks, and end the trace."""
        for router in self._routers:
            router.handle.remove()
        if self._trace is not None:
            self._trace.close()


class _ObservedRouter:
    """Counter of one router."""

    def __init__(
        self, number: int, name: str, module: nn.Module, ids: ExpertIds, num_experts: int | None
    ) -> None:
        weight: Any = getattr(module, "weight", None)
        known = num_experts or getattr(module, "num_experts", None)
        if known is None and weight is None:
            raise JobError(f"router {name} does not tell its experts: give num_experts")
        self.number, self.name, self._ids = number, name, ids
        self.num_experts = int(known or weight.shape[0])
        self.top_k = int(getattr(module, "top_k", 0))
        self._counts_1E: torch.Tensor | None = None
        self._one: torch.Tensor | None = None
        self._forwards = 0
        self._device = torch.device("cpu") if weight is None else weight.device
        self.handle = module.register_forward_hook(self._count)

    def finished(self, width: int) -> torch.Tensor:
        """Return the counts of the step, its forwards last, int64 ``(width + 1,)``; begin anew."""
        row = torch.zeros(width + 1, dtype=torch.int64, device=self._device)
        if self._counts_1E is not None:
            row[: self.num_experts] = self._counts_1E[0]
            self._counts_1E.zero_()
        row[width], self._forwards = self._forwards, 0
        return row

    def _count(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        if not module.training or is_recomputation():
            return
        with torch.no_grad():
            ids = self._ids(module, output)
            if not _are_integers(ids) or self.top_k not in (0, ids.shape[-1]):
                raise JobError(
                    f"expert_ids of router {self.name} is not the ids of its chosen experts: give "
                    "observe() a function expert_ids(router, output) that returns them, integers (..., K)"
                )
            if self._counts_1E is None or self._one is None:
                self._device, self.top_k = ids.device, ids.shape[-1]
                self._counts_1E = ids.new_zeros(1, self.num_experts, dtype=torch.int64)
                self._one = ids.new_ones((), dtype=torch.int64)
            add_tokens_(self._counts_1E, ids.long().reshape(1, -1, self.top_k), self._one)
            self._forwards += 1


def _are_integers(found: Any) -> bool:
    return (
        isinstance(found, torch.Tensor)
        and found.dtype is not torch.bool
        and not (found.is_floating_point() or found.is_complex())
    )


def _chosen(router: Any, output: Any) -> Any:
    """Find the ids in the output of a router of transformers 5; None if there are none."""
    found = [output] if isinstance(output, torch.Tensor) else list(output)
    if integers := [tensor for tensor in found if _are_integers(tensor)]:
        return integers[-1]
    last, top_k = found[-1], getattr(router, "top_k", None)
    if top_k is None or not isinstance(last, torch.Tensor) or not last.is_floating_point():
        return None
    return last.topk(int(top_k), dim=-1).indices  # Llama 4


def _numbers(names: list[str]) -> list[int]:
    """Return the numbers of the layers in their names, or 0, 1, ... where names have none."""
    digits = [[int(part) for part in name.split(".") if part.isdecimal()] for name in names]
    numbers = [found[0] for found in digits if found]
    return numbers if len(set(numbers)) == len(names) else list(range(len(names)))

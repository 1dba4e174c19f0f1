"""When each micro-batch passes a router, forward and backward, told by the device itself.

Python cannot tell: a compiled block runs none of it, nor does the replay of a CUDA
graph, and activation checkpointing runs it twice. So a clock lives in device buffers
and two operators tick it. To the compiler they are opaque: they reach their clock by
a number, because a buffer that the forward and the backward both change cannot be
saved between them.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import spmd_types as spmd
import torch
from spmd_types.runtime import get_local_type, get_partition_spec
from torchtitan.protocols.module import Module


class EventClock(Module):
    """Times of the forward and backward events of one router during a step.

    Every schedule of torch runs the backward passes of a stage in the order of its
    forward passes, so the number of the event is the number of the micro-batch.

    Attributes:
        time: events so far on this rank, int64 ``()``; one tensor for all routers of the rank.
        steps: finished optimizer steps, int64 ``()``.
        forward_count, backward_count: events of the running step, int64 ``()``.
        forward_times_M, backward_times_M: ``time`` of each event of the running step,
            int64 ``(M,)`` for M micro-batches.
        step_forward_times_M, step_backward_times_M: the same of the last finished step; 0
            where there was no event.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        num_micro_batches: int

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.num_micro_batches = config.num_micro_batches
        self._handle: torch.Tensor | None = None
        self._register(device=None)

    def _register(self, device: torch.device | None) -> None:
        for name in ("time", "steps", "forward_count", "backward_count"):
            zero = torch.zeros((), dtype=torch.int64, device=device)
            self.register_buffer(name, zero, persistent=False)
        for name in ("forward_times_M", "backward_times_M"):
            for buffer in (name, f"step_{name}"):
                zeros = torch.zeros(self.num_micro_batches, dtype=torch.int64, device=device)
                self.register_buffer(buffer, zeros, persistent=False)

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        self._register(buffer_device or self.time.device)

    @property
    def wired(self) -> bool:
        """Whether :func:`wire` has started the clock; before, there are no events."""
        return self._handle is not None

    def forward_event(self) -> torch.Tensor:
        """Note that a forward has begun; the number of its micro-batch, int64 ``()``.

        In a forward that activation checkpointing repeats: the number that it had.
        """
        assert self._handle is not None
        return _forward_event(self._handle, self.time.device)

    def backward_event(self, tensor: torch.Tensor, micro_batch: torch.Tensor) -> torch.Tensor:
        """The tensor itself, whose gradient notes that the micro-batch's backward passed.

        Args:
            tensor: any activation, as a local tensor.
            micro_batch: what :meth:`forward_event` gave.
        """
        return _NoteBackward.apply(tensor, micro_batch, self._handle)

    def forward_number(self, micro_batch: torch.Tensor) -> torch.Tensor:
        """Forwards of this router before this one since training began, int64 ``()``."""
        return self.steps * self.num_micro_batches + micro_batch

    def slot(self, micro_batch: torch.Tensor) -> torch.Tensor:
        """Index of the micro-batch in a buffer of M, ``(1,)``: what is beyond joins the last."""
        return micro_batch.clamp(max=self.num_micro_batches - 1).unsqueeze(0)


def wire(clocks: Iterable[EventClock]) -> None:
    """Start the clocks of a rank: one time for all of them. Once, when the model is built."""
    clocks = list(clocks)
    for clock in clocks:
        clock.time = clocks[0].time
        number = next(_numbers)
        # On the host, so that reading it waits for no device; a tensor, so that the
        # compiled blocks of all layers are one graph.
        clock._handle = torch.tensor(number, device="cpu")
        _clocks[number] = clock


def finish_step(clocks: Iterable[EventClock]) -> None:
    """Keep the times of the step and start anew."""
    clocks = list(clocks)
    if not clocks:
        return
    for name in ("forward_times_M", "backward_times_M"):
        running = [getattr(clock, name) for clock in clocks]
        torch._foreach_copy_([getattr(clock, f"step_{name}") for clock in clocks], running)
        torch._foreach_zero_(running)
    torch._foreach_zero_([clock.forward_count for clock in clocks])
    torch._foreach_zero_([clock.backward_count for clock in clocks])
    torch._foreach_add_([clock.steps for clock in clocks], 1)


_numbers = itertools.count()
_clocks: weakref.WeakValueDictionary[int, EventClock] = weakref.WeakValueDictionary()


@torch.library.custom_op("titan_moe_lb::forward_event", mutates_args=())
def _forward_event(handle: torch.Tensor, device: torch.device) -> torch.Tensor:
    clock = _clocks[int(handle)]
    if torch._C._current_graph_task_id() != -1:
        # The autograd engine is running: a checkpoint recomputes, in Python or compiled.
        return clock.backward_count.clone()
    micro_batch = clock.forward_count.clone()
    clock.time.add_(1)
    clock.forward_times_M.index_copy_(0, clock.slot(micro_batch), clock.time.unsqueeze(0))
    clock.forward_count.add_(1)
    return micro_batch


@_forward_event.register_fake
def _(handle: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty((), dtype=torch.int64, device=device)


@torch.library.custom_op("titan_moe_lb::backward_event", mutates_args=())
def _backward_event(
    gradient: torch.Tensor, micro_batch: torch.Tensor, handle: torch.Tensor
) -> torch.Tensor:
    # micro_batch makes a compiled backward recompute the forward event, which reads
    # the count, before this event changes it. The copy makes it keep the event at all.
    clock = _clocks[int(handle)]
    clock.time.add_(1)
    clock.backward_times_M.index_copy_(0, clock.slot(micro_batch), clock.time.unsqueeze(0))
    clock.backward_count.add_(1)
    return gradient.clone()


@_backward_event.register_fake
def _(gradient: torch.Tensor, micro_batch: torch.Tensor, handle: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(gradient)


@spmd.register_autograd_function
class _NoteBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor, micro_batch: torch.Tensor, handle: torch.Tensor):
        ctx.save_for_backward(micro_batch, handle)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return _backward_event(gradient, *ctx.saved_tensors), None, None

    @staticmethod
    def typecheck_forward(tensor: torch.Tensor, micro_batch: torch.Tensor, handle: torch.Tensor):
        """SPMD type: that of the tensor."""
        with spmd.no_typecheck():
            same = _NoteBackward.apply(tensor, micro_batch, handle)
        spmd.assert_type(same, get_local_type(tensor), get_partition_spec(tensor))
        return same

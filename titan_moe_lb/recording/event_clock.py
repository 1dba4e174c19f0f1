"""When each micro-batch passes a router, forward and backward, told by the device itself.

Python cannot tell: a compiled block runs none of it, nor does the replay of a CUDA
graph, and activation checkpointing runs it again. So a clock lives in device buffers
and two operators tick it. To the compiler they are opaque: they reach their clock by
a number, because a buffer that the forward and the backward both change cannot be
saved between them.

A repeated forward has to know which forward it repeats, and a zero-bubble schedule
repeats it twice, in an order of its own. What activation checkpointing does restore
is the state of the random generator: each forward draws a key, and the forward that
draws a key again is the same one.
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

    Attributes:
        time: events so far on this rank, int64 ``()``; one tensor for all routers of the rank.
        steps: finished optimizer steps, int64 ``()``.
        forward_count: forward events of the running step, int64 ``()``.
        keys_M: what each forward of the running step drew, int64 ``(M,)``, above 0.
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
        for name in ("time", "steps", "forward_count"):
            zero = torch.zeros((), dtype=torch.int64, device=device)
            self.register_buffer(name, zero, persistent=False)
        for name in (
            "keys_M",
            "forward_times_M",
            "backward_times_M",
            "step_forward_times_M",
            "step_backward_times_M",
        ):
            zeros = torch.zeros(self.num_micro_batches, dtype=torch.int64, device=device)
            self.register_buffer(name, zeros, persistent=False)

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
        # Drawn here and not in the operator, so that a compiler restores the generator.
        key = torch.randint(1, 2**62, (), dtype=torch.int64, device=self.time.device)
        return _forward_event(key, self._handle)

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
    for name in ("keys_M", "forward_count"):
        torch._foreach_zero_([getattr(clock, name) for clock in clocks])
    torch._foreach_add_([clock.steps for clock in clocks], 1)


_numbers = itertools.count()
_clocks: weakref.WeakValueDictionary[int, EventClock] = weakref.WeakValueDictionary()


@torch.library.custom_op("titan_moe_lb::forward_event", mutates_args=())
def _forward_event(key: torch.Tensor, handle: torch.Tensor) -> torch.Tensor:
    clock = _clocks[int(handle)]
    if torch._C._current_graph_task_id() != -1:
        # The autograd engine is running: a checkpoint recomputes, in Python or compiled.
        return (clock.keys_M == key).long().argmax()
    micro_batch = clock.forward_count.clone()
    slot = clock.slot(micro_batch)
    clock.time.add_(1)
    clock.keys_M.index_copy_(0, slot, key.unsqueeze(0))
    clock.forward_times_M.index_copy_(0, slot, clock.time.unsqueeze(0))
    clock.forward_count.add_(1)
    return micro_batch


@_forward_event.register_fake
def _(key: torch.Tensor, handle: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(key)


@torch.library.custom_op("titan_moe_lb::backward_event", mutates_args=())
def _backward_event(
    gradient: torch.Tensor, micro_batch: torch.Tensor, handle: torch.Tensor
) -> torch.Tensor:
    # A zero-bubble schedule runs a compiled backward once for the inputs and once for
    # the weights: the first counts. The copy makes a compiler keep the event.
    clock = _clocks[int(handle)]
    clock.time.add_(1)
    slot = clock.slot(micro_batch)
    noted = clock.backward_times_M.index_select(0, slot)
    noted = torch.where(noted > 0, noted, clock.time)
    clock.backward_times_M.index_copy_(0, slot, noted)
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

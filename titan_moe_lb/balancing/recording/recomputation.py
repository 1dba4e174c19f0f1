"""Reuse of routing decisions when activation checkpointing recomputes a forward.

A recomputed forward would choose the experts again. If scores tie, or a kernel is not
deterministic, its choice could differ from the first one, whose outputs the loss has used. The
decisions of the first forward, a few numbers a token, are therefore saved beside the checkpoint
and reused. Nothing is chosen, counted or recorded twice.

Eager full checkpointing saves them in :class:`Decisions`, without an operator. Selective
checkpointing and compiled blocks select operators: there a decision passes through
:func:`save_decision`, whose result their policy saves.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch

from titan_moe_lb.upstream.torch_internals import in_backward

T = TypeVar("T")


def is_recomputation() -> bool:
    """Return True in a forward that eager activation checkpointing recomputes in the backward.

    Non-reentrant checkpointing recomputes inside the autograd engine, where a graph task is
    current; torch.utils.checkpoint relies on the same fact. A compiled block needs no test: only
    its forward graph contains the mutations of buffers.
    """
    return not torch.compiler.is_compiling() and in_backward()


def saved_decision(make: Callable[[], T]) -> T:
    """Return the result of ``make``; a recomputation under :class:`Decisions` returns the first."""
    if torch.compiler.is_compiling() or _current.decisions is None:
        return make()
    return _current.decisions._next(make)


@torch.library.custom_op("titan_moe_lb::save_decision", mutates_args=())
def _save_decision(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone()


@_save_decision.register_fake
def _(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor)


def save_decision(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor by an operator that a checkpointing policy can save.

    A router holds this function: ``copy.deepcopy`` of a model cannot copy the operator.
    """
    return _save_decision(tensor)


def save_no_decision(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor itself, for checkpointing without a policy of operators."""
    return tensor


class Decisions:
    """Decisions of one run of a checkpointed region, in order.

    Attributes:
        first, again: contexts of its forward and of each recomputation, for the
            ``context_fn`` of ``torch.utils.checkpoint``.
    """

    def __init__(self) -> None:
        self._made: list[Any] = []
        self._position: int | None = None
        self.first = _During(self, again=False)
        self.again = _During(self, again=True)

    @classmethod
    def contexts(cls) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Create the contexts of a new run; a ``context_fn``."""
        decisions = cls()
        return decisions.first, decisions.again

    def _next(self, make: Callable[[], T]) -> T:
        if self._position is None:
            self._made.append(make())
            return self._made[-1]
        self._position += 1
        return self._made[self._position - 1]


class _During(AbstractContextManager):
    """Context of a forward or its recomputations; a zero-bubble schedule recomputes it twice."""

    def __init__(self, decisions: Decisions, *, again: bool) -> None:
        self._decisions, self._again = decisions, again
        self._outer: list[Decisions | None] = []

    def __enter__(self) -> None:
        self._outer.append(_current.decisions)
        self._decisions._position = 0 if self._again else None
        _current.decisions = self._decisions

    def __exit__(self, *exception: object) -> None:
        _current.decisions = self._outer.pop()


class _Current(threading.local):
    """Decisions of the running thread; the autograd engine recomputes forwards in other threads."""

    decisions: Decisions | None = None


_current = _Current()

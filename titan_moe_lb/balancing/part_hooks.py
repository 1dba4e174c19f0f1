"""Forward hooks of a model part, inactive in its copies."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from titan_moe_lb.balancing.recording.recomputation import is_recomputation
from titan_moe_lb.balancing.recording.step_record import StepRecord


class PartHooks:
    """Forward hooks of a model part of a rank.

    ``copy.deepcopy`` of a model copies its hooks. They do nothing in the copy, where they would
    count forwards of a step that no loop closes.
    """

    def __init__(
        self, part: nn.Module, record: StepRecord, routers: slice, step_hook: Any = None
    ) -> None:
        """Register the hooks.

        ``routers`` are the rows of the part's routers in the record. ``step_hook`` is for the first
        part of a rank; it has ``forward_begins`` and ``forward_ends``.
        """
        self._part, self._record, self._routers = part, record, routers
        self._step_hook = step_hook
        part.register_forward_pre_hook(self._begins, with_kwargs=True)
        part.register_forward_hook(self._ends)
        if step_hook is not None:
            step_hook.forward_ends()

    def _begins(self, part: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if part is self._part and self._step_hook is not None:
            self._step_hook.forward_begins(part, args, kwargs)

    def _ends(self, part: nn.Module, args: tuple, output: Any) -> None:
        if part is not self._part:
            return
        if part.training and torch.is_grad_enabled() and not is_recomputation():
            self._record.finish_forward(self._routers)
        if self._step_hook is not None:
            self._step_hook.forward_ends()

    def __deepcopy__(self, _memo: object) -> PartHooks:
        return self

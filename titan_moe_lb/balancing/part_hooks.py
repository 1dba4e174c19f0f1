"""A step hook around the forwards of its model, and of no copy of it."""

from __future__ import annotations

from typing import Any

from torch import nn


class PartHooks:
    """The forward hooks of a rank's first model part.

    ``copy.deepcopy`` of a model copies its hooks. Those of a copy would count forwards in a step
    that nobody closes, and process groups cannot be copied.
    """

    def __init__(self, part: nn.Module, step_hook: Any) -> None:
        """
        Args:
            step_hook: has ``forward_begins`` and ``forward_ends``.
        """
        self._part, self._step_hook = part, step_hook
        part.register_forward_pre_hook(self._begins, with_kwargs=True)
        part.register_forward_hook(self._ends)
        step_hook.forward_ends(part, (), None)

    def _begins(self, part: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if part is self._part:
            self._step_hook.forward_begins(part, args, kwargs)

    def _ends(self, part: nn.Module, args: tuple, output: Any) -> None:
        if part is self._part:
            self._step_hook.forward_ends(part, args, output)

    def __deepcopy__(self, _memo: object) -> PartHooks:
        return self

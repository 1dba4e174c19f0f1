"""Settings of anticipatory routing, a table of a job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from titan_moe_lb.balancing.component import Component
from titan_moe_lb.errors import JobError


class Anticipatory(Component):
    """Train each batch with the experts that the parameters of ``delay`` steps ago choose for it.

    The batch of a step is read ``delay`` steps ahead. One forward without gradients records its
    experts then. Scores, gates and gradients are those of the step. The first ``delay`` steps use
    the experts that the first parameters choose. Source: DeepSeek-V4 (arXiv 2606.19348), 4.2.3.
    """

    kinds: ClassVar[dict[str, type[Any]]] = {}
    type_name: ClassVar[str] = "anticipatory"

    @dataclass(kw_only=True, slots=True)
    class Config(Component.Config):
        delay: int
        """Age of the parameters that choose, in optimizer steps; 0 equals plain training."""

        def __post_init__(self) -> None:
            if self.delay < 0:
                raise JobError(
                    f"[model] routing delay is {self.delay}; it is a number of steps, at least 0"
                )

"""What a number of the trace is: declared by who records it, read by who shows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True, slots=True)
class Column:
    """One named number of every layer, or of the step. The trace has a column of its name."""

    name: str
    per: Literal["layer", "step"] = "layer"
    summary: Literal["mean", "max", "sum"] = "mean"
    """How the layers become one number of the step."""
    is_aux_loss: bool = False
    description: str = ""
    """One line for who reads a page."""

    def over_layers(self, values: np.ndarray) -> np.ndarray:
        """Summarise float64 ``(..., M)`` to ``(...)``.

        Layers that are NaN are left out; NaN where all of them are.
        """
        known = ~np.isnan(values)
        if self.summary == "max":
            total = np.where(known, values, -np.inf).max(axis=-1)
        else:
            total = np.where(known, values, 0.0).sum(axis=-1)
        num_known = known.sum(axis=-1)
        if self.summary == "mean":
            total = total / np.maximum(num_known, 1)
        return np.where(num_known > 0, total, np.nan)

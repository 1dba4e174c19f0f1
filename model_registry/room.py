"""What every room of the registry is made of.

A room is a package ``model_registry/<model>/`` with

- ``__init__.py``: ``FLAVORS``, ``DEFAULTS`` (a :class:`Default` for each balancing
  choice, with its source) and ``model_registry(flavor, ...)``, decorated with
  :func:`titan_moe_lb.model_spec.registry_entry`;
- ``config_registry.py``: one config function per job, ``debug_config`` (the name of
  the one that runs when none is named) and ``loss_config(spec)``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from titan_moe_lb.errors import JobError


@dataclass(frozen=True)
class Default:
    """A value that a registry entry takes when the job names none, and where it comes from."""

    key: str
    """Argument of the registry entry, a key of [model]."""
    value: Any
    source: str
    """Paper and section, or plainly that nobody published one."""


def check_flavor(model: str, flavor: str, flavors: Iterable[str]) -> None:
    """Raises ``JobError`` naming the nearest flavor unless the model has this one."""
    valid = list(flavors)
    if flavor not in valid:
        nearest = difflib.get_close_matches(flavor, valid, n=1, cutoff=0.0)[0]
        raise JobError(
            f"{model} has no flavor {flavor!r}; did you mean {nearest!r}? "
            f"(flavors: {', '.join(valid)})"
        )

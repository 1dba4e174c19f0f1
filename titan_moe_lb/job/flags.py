"""The flags of a job: every value of its config that the command line can set."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from titan_moe_lb import toml_tables


def flags_of(config: Any, prefix: str = "--") -> Iterator[str]:
    """Of a ``Trainer.Config``, or of a part of it, as they are written."""
    for field, hint in toml_tables.settable(type(config)).items():
        value = getattr(config, field.name)
        kinds = toml_tables.kinds(hint)
        for kind, cls in kinds.items():
            yield f"{prefix[2:]}{field.name.replace('_', '-')}:{kind}"
            parts = toml_tables.settable(cls) if cls else ()
            yield from (f"{prefix}{field.name}.{part.name}" for part in parts)
        if not kinds:
            yield from _flags(value, f"{prefix}{field.name}")
        if isinstance(value, bool):
            yield f"{prefix}no-{field.name}"


def _flags(value: Any, name: str) -> Iterator[str]:
    if dataclasses.is_dataclass(value):
        yield from flags_of(value, f"{name}.")
    elif isinstance(value, list) and value and dataclasses.is_dataclass(value[0]):
        for index, item in enumerate(value):
            yield from flags_of(item, f"{name}.{index}.")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _flags(item, f"{name}.{key}")
    else:
        yield name

"""Base class of losses, bias rules and forced strategies, which a job selects by name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import spmd_types as spmd
from torchtitan.models.common.decoder_sharding import dense_param_placement
from torchtitan.protocols.module import Module
from torchtitan.protocols.sharding import ShardingConfig

from titan_moe_lb.balancing.own_dtypes import keep_dtypes
from titan_moe_lb.errors import JobError


class Component(Module):
    """Base class of the components of a family.

    The base class of a family defines ``kinds``. A subclass that defines ``type_name`` is added to
    ``kinds``, so a user's own class needs no registration. Its ``Config`` is that of its base class,
    unless it defines one.
    """

    type_name: ClassVar[str]
    """Name in a job config: ``type = "..."``."""

    kinds: ClassVar[dict[str, type[Any]]]
    """Configurable components of the family, by ``type_name``."""

    filled_by_job: ClassVar[frozenset[str]] = frozenset()
    """Fields of the Config that the job fills and a job file cannot set."""

    def __init_subclass__(cls, **kwargs) -> None:
        is_kind = "type_name" in cls.__dict__
        if is_kind and "Config" not in cls.__dict__:
            names = {"__module__": cls.__module__, "__qualname__": f"{cls.__qualname__}.Config"}
            config = type("Config", (cls.Config,), names)  # whose owner is this class
            cls.Config = dataclass(kw_only=True, slots=True)(config)  # type: ignore[misc]
        super().__init_subclass__(**kwargs)
        if is_kind:
            enter(cls.kinds, "type_name", cls)

    def __init__(self) -> None:
        super().__init__()
        keep_dtypes(self)

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        def replicate(self, names: Iterable[str]) -> None:
            """Replicate buffers on every rank; torchtitan requires a placement of all state."""
            placement = dense_param_placement(tp=spmd.R)
            self.sharding_config = ShardingConfig(state_shardings=dict.fromkeys(names, placement))

        def describe(self) -> str:
            """Return the name and the settings as one phrase, for messages and the trace."""
            # The fields of torchtitan's Module.Config are no settings of the method.
            own = {field.name for field in dataclasses.fields(Module.Config)}
            given = {
                field.name: getattr(self, field.name)
                for field in dataclasses.fields(self)
                if field.name not in own | self._owner.filled_by_job
            }
            settings = [
                f"{name} {', '.join(map(str, value)) if isinstance(value, list) else value}"
                for name, value in given.items()
                if value is not None and value is not False and value != []
            ]
            return f"{self._owner.type_name} ({', '.join(settings)})".removesuffix(" ()")


def enter(kinds: dict[str, type], key: str, component: type) -> None:
    """Add a class to its family, under its attribute ``key``.

    A class with the same module path replaces the earlier one: its module was imported again.

    Raises:
        JobError: another class of the family has the name.
    """
    name, path = getattr(component, key), _path(component)
    other = _path(kinds.get(name, component))
    if other != path:
        raise JobError(f"{path} and {other} both have {key} = {name!r}: rename one of them")
    kinds[name] = component


def first_paragraph(documented: object) -> str:
    """Return the first paragraph of a docstring as one line."""
    return " ".join((inspect.getdoc(documented) or "").partition("\n\n")[0].split())


def _path(component: type) -> str:
    return f"{component.__module__}.{component.__qualname__}"


def require_formula(
    what: str, component: type[Component], base: type[Component], method: str
) -> None:
    """Require that a class overrides the method that contains its formula."""
    if getattr(component, method) is getattr(base, method):
        raise JobError(
            f"the {what} {component.__name__} has no formula: define {method}() in its class"
        )

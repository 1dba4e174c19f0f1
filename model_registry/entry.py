"""What every model package of the registry is made of.

A model package is ``model_registry/<model>/`` with

- ``__init__.py``: ``FLAVORS``, ``DEFAULTS`` (a :class:`Default` for each balancing
  choice, with its source) and ``model_registry(flavor, ...)``, which builds a torchtitan
  ``ModelSpec``, decorated with :func:`registry_entry`;
- ``config_registry.py``: one config function per job, ``debug_config`` (the name of
  the one that runs when none is named) and, where the language-model loss depends on
  the arguments of the model, ``loss_config(spec)``.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torchtitan.models.common.decoder import Decoder
from torchtitan.protocols.model_spec import ModelSpec

from titan_moe_lb.errors import JobError, nearest
from titan_moe_lb.wiring.model_spec import BalancedModelSpec, balanced


@dataclass(frozen=True)
class Default:
    """A value that a registry entry takes when the job names none, and where it comes from."""

    key: str
    """Argument of :func:`titan_moe_lb.wiring.model_spec.balanced`, a key of [model]."""
    value: Any
    source: str
    """Paper and section, or plainly that nobody published one."""
    flavors: tuple[str, ...] = ()
    """The flavors that take it, in place of what all flavors take; empty: all flavors."""


def defaults_of(defaults: Iterable[Default], flavor: str) -> dict[str, Default]:
    """The default of each key in a flavor: its own before that of all flavors."""
    fitting = [default for default in defaults if not default.flavors or flavor in default.flavors]
    return {default.key: default for default in sorted(fitting, key=lambda d: bool(d.flavors))}


def registry_entry(
    model: str, flavors: Sequence[str], defaults: Sequence[Default]
) -> Callable[[Callable[..., ModelSpec]], Callable[..., BalancedModelSpec]]:
    """Decorator of a function ``(flavor, ...) -> ModelSpec``: balances what it builds.

    The entry takes the arguments of :func:`titan_moe_lb.wiring.model_spec.balanced` as well,
    with the defaults of the flavor, and keeps all of them on the spec.

    Raises:
        JobError: a default is of a flavor or a key that does not exist; or, when the entry is
            called, the flavor is none of ``flavors``.
    """
    shared = [
        parameter
        for name, parameter in inspect.signature(balanced).parameters.items()
        if name != "spec"
    ]
    keys = [parameter.name for parameter in shared]
    for default in defaults:
        if default.key not in keys:
            raise JobError(
                f"{model} has a default of {default.key!r}; {nearest(default.key, keys)}"
            )
        for flavor in default.flavors:
            if flavor not in flavors:
                raise JobError(
                    f"{model} has a default of {default.key} for the flavor {flavor!r}; "
                    f"{nearest(flavor, flavors)}"
                )
    of_all = {default.key: default.value for default in defaults if not default.flavors}
    shared = [
        parameter.replace(default=of_all.get(parameter.name, parameter.default))
        for parameter in shared
    ]

    def decorate(build: Callable[..., ModelSpec]) -> Callable[..., BalancedModelSpec]:
        own = inspect.signature(build)
        signature = own.replace(
            parameters=[*own.parameters.values(), *shared], return_annotation=BalancedModelSpec
        )

        @functools.wraps(build)
        def entry(*args, **kwargs) -> BalancedModelSpec:
            bound = signature.bind(*args, **kwargs)
            given = set(bound.arguments)
            bound.apply_defaults()
            flavor = bound.arguments["flavor"]
            if flavor not in flavors:
                raise JobError(f"{model} has no flavor {flavor!r}; {nearest(flavor, flavors)}")
            for key, default in defaults_of(defaults, flavor).items():
                if key not in given:
                    bound.arguments[key] = default.value
            ours = {parameter.name: bound.arguments[parameter.name] for parameter in shared}
            rest = {k: v for k, v in bound.arguments.items() if k not in ours}
            spec = balanced(build(**rest), **ours)
            spec.arguments = dict(bound.arguments)
            return spec

        entry.__signature__ = signature  # type: ignore[attr-defined]
        entry.__annotations__ = {
            **typing.get_type_hints(balanced),
            **typing.get_type_hints(build),
            "return": BalancedModelSpec,
        }
        return entry

    return decorate


def resized(config: Decoder.Config, dim: int, layers: list) -> Decoder.Config:
    """A decoder with the vocabulary of ``config``, around other layers, of width ``dim``."""
    return dataclasses.replace(
        config,
        dim=dim,
        tok_embeddings=dataclasses.replace(config.tok_embeddings, embedding_dim=dim),
        norm=dataclasses.replace(config.norm, normalized_shape=dim),
        lm_head=dataclasses.replace(config.lm_head, in_features=dim),
        layers=layers,
    )

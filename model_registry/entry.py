"""Parts that every model package of the registry uses.

A model package is a folder ``model_registry/<model>/``:

- ``__init__.py`` has ``FLAVORS`` and ``model_registry(flavor, ...)``, which builds a torchtitan
  ``ModelSpec`` and is decorated with :func:`registry_entry`. It imports ``DEFAULTS``.
- ``defaults.py`` has ``DEFAULTS``: a :class:`Default` for each balancing choice, with its source.
- ``config_registry.py`` has one config function per job, ``debug_config`` (name of the default one),
  and ``loss_config(spec)`` if the language-model loss depends on the model.
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
    """Value of a registry entry's argument for jobs that set none, with its source."""

    key: str
    """Argument of :func:`titan_moe_lb.wiring.model_spec.balanced`, a key of [model]."""
    value: Any
    source: str
    """Paper and section, or a note that nobody has published a value."""
    flavors: tuple[str, ...] = ()
    """Flavors with this default, which replaces the default of all flavors; empty: all flavors."""


def defaults_of(defaults: Iterable[Default], flavor: str) -> dict[str, Default]:
    """Return the default of each key in a flavor: its own, else the default of all flavors."""
    fitting = [default for default in defaults if not default.flavors or flavor in default.flavors]
    return {default.key: default for default in sorted(fitting, key=lambda d: bool(d.flavors))}


def registry_entry(
    model: str, flavors: Sequence[str], defaults: Sequence[Default]
) -> Callable[[Callable[..., ModelSpec]], Callable[..., BalancedModelSpec]]:
    """Decorate a function ``(flavor, ...) -> ModelSpec`` so that it returns balanced specs.

    The entry also accepts the arguments of :func:`titan_moe_lb.wiring.model_spec.balanced`, with
    the defaults of the flavor, and saves all arguments on the spec.

    Raises:
        JobError: a default names an unknown flavor or key; or the entry is called with an unknown
            flavor.
    """
    _spec, *of_balanced = inspect.signature(balanced).parameters.values()
    keys = [parameter.name for parameter in of_balanced]
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
    shared = [p.replace(default=of_all.get(p.name, p.default)) for p in of_balanced]

    def decorate(build: Callable[..., ModelSpec]) -> Callable[..., BalancedModelSpec]:
        own = inspect.signature(build)
        signature = own.replace(
            parameters=[*own.parameters.values(), *shared], return_annotation=BalancedModelSpec
        )

        @functools.wraps(build)
        def entry(*args, **kwargs) -> BalancedModelSpec:
            bound = signature.bind(*args, **kwargs)
            flavor = bound.arguments["flavor"]
            if flavor not in flavors:
                raise JobError(f"{model} has no flavor {flavor!r}; {nearest(flavor, flavors)}")
            of_flavor = {key: d.value for key, d in defaults_of(defaults, flavor).items()}
            bound.arguments = {**of_flavor, **bound.arguments}
            bound.apply_defaults()
            rest = dict(bound.arguments)
            balance = {key: rest.pop(key) for key in keys}
            spec = balanced(build(**rest), **balance)
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
    """Return a decoder with the vocabulary of ``config`` and other layers, of width ``dim``."""
    return dataclasses.replace(
        config,
        dim=dim,
        tok_embeddings=dataclasses.replace(config.tok_embeddings, embedding_dim=dim),
        norm=dataclasses.replace(config.norm, normalized_shape=dim),
        lm_head=dataclasses.replace(config.lm_head, in_features=dim),
        layers=layers,
    )

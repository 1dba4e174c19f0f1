"""TOML tables onto dataclass configs and back, strictly checked.

A table may set fields of the config that the registry built; an unknown key, a
wrong type or a value outside a choice raises ``JobError`` naming the place and
the nearest valid name. TOML has no null: the string ``"none"`` stands for None in
a field that may be None. A choice between configs (activation checkpointing, aux
losses) is a table with a ``type``.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import types
import typing
from typing import Annotated, Any, Literal, Union

import typeguard

from titan_moe_lb.errors import JobError, nearest

NONE = "none"

_NOT_IN_TOML = {"model_spec", "param_init", "sharding_config"}


def merge(config: Any, table: dict[str, Any], where: str) -> None:
    """Set fields of a dataclass instance from a table, in place.

    Args:
        config: a dataclass instance; nested instances are merged into.
        table: parsed TOML.
        where: the place for messages, for example ``debug.toml: [training]``.

    Raises:
        JobError: the first key that does not fit.
    """
    hints = _hints(type(config))
    for key, value in table.items():
        if key not in hints:
            raise JobError(f"{where} has no key {key!r}; {nearest(key, hints)}")
        merge_field(config, key, value, f"{where} {key}")


def merge_field(config: Any, name: str, value: Any, where: str) -> None:
    """Set one field of a dataclass instance. Args and errors: as :func:`merge`."""
    hint = _hints(type(config))[name]
    setattr(config, name, _value(getattr(config, name), hint, value, where))


def construct(hint: Any, value: Any, where: str) -> Any:
    """The value of an annotated parameter that has no current value."""
    return _value(None, hint, value, where)


def dump(config: Any) -> dict[str, Any]:
    """The inverse of :func:`merge`: every field that a table can set."""
    return {
        name: dump_value(hint, getattr(config, name))
        for name, hint in _hints(type(config)).items()
        if not callable(getattr(config, name))
    }


def settable(cls: type) -> dict[dataclasses.Field, Any]:
    """The fields that TOML may set and their annotations, in order."""
    hints = typing.get_type_hints(cls, include_extras=True)
    hidden = _NOT_IN_TOML | getattr(getattr(cls, "_owner", None), "filled_by_job", frozenset())
    return {
        field: hints[field.name]
        for field in dataclasses.fields(cls)
        if field.name not in hidden and not field.name.startswith("_")
    }


def _hints(cls: type) -> dict[str, Any]:
    return {field.name: hint for field, hint in settable(cls).items()}


def _value(current: Any, hint: Any, value: Any, where: str) -> Any:
    plain = _without_annotation(hint)
    choices = _choices(plain)
    if choices:
        return _choose(current, choices, value, where)
    if value == NONE and _allows_none(plain) and not _allows_literal(plain, NONE):
        return None
    if dataclasses.is_dataclass(current) and not isinstance(current, type):
        merge(current, _table(value, where), where)
        return current
    element = _dataclass_element(plain)
    if element is not None:
        return _list_of_configs(current or [], element, value, where)
    if isinstance(current, dict) and isinstance(value, dict):
        # TOML has lists alone; AdamW's betas are a tuple.
        return current | {
            key: tuple(item) if isinstance(current.get(key), tuple) else item
            for key, item in value.items()
        }
    return _checked(plain, value, where)


def _list_of_configs(current: list, element: Any, value: Any, where: str) -> list:
    """Entries merge into the registry's entries by position; further ones are added."""
    tables = value if isinstance(value, list) else [value]
    merged = list(current)
    for index, table in enumerate(tables):
        place = f"{where}[{index}]"
        if _kinds(element):
            entry = _choose(None, _kinds(element), table, place)
        elif index < len(current):
            entry = _value(current[index], element, table, place)
        else:
            entry = _build(element, _table(table, place), place)
        merged[index : index + 1] = [entry]
    return merged[: len(tables)] if _kinds(element) else merged


def _choose(current: Any, choices: dict[str, type | None], value: Any, where: str) -> Any:
    if isinstance(value, str):
        value = {"type": value}
    table = dict(_table(value, where))
    name = table.pop("type", None)
    if name is None:
        if current is None:
            raise JobError(f"{where} needs a type; valid: {', '.join(choices)}")
        merge(current, table, where)
        return current
    if not isinstance(name, str) or name not in choices:
        raise JobError(f"{where} type {name!r} does not exist; {nearest(str(name), choices)}")
    cls = choices[name]
    if cls is None:
        if table:
            raise JobError(f"{where} type {name!r} takes no further keys")
        return None
    return _build(cls, table, where)


def _build(cls: type, table: dict[str, Any], where: str) -> Any:
    hints = _hints(cls)
    for key in table:
        if key not in hints:
            raise JobError(f"{where} has no key {key!r}; {nearest(key, hints)}")
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING and (
            field.default_factory is dataclasses.MISSING
        )
        if required and field.name in hints and field.name not in table:
            raise JobError(f"{where} needs {field.name!r}")
    arguments = {
        key: construct(hints[key], value, f"{where} {key}") for key, value in table.items()
    }
    try:
        return cls(**arguments)
    except ValueError as error:
        raise JobError(f"{where}: {error}") from None


def _checked(hint: Any, value: Any, where: str) -> Any:
    if isinstance(value, bool) and not _accepts_bool(hint):
        raise JobError(f"{where} is {_show(value)}; it must be {describe(hint)}")
    try:
        typeguard.check_type(
            value, hint, collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS
        )
    except typeguard.TypeCheckError:
        literals = _literals(hint)
        remedy = f"; {nearest(value, literals)}" if literals and isinstance(value, str) else ""
        raise JobError(f"{where} is {_show(value)}; it must be {describe(hint)}{remedy}") from None
    return value


def dump_value(hint: Any, value: Any) -> Any:
    """The inverse of :func:`construct`."""
    plain = _without_annotation(hint)
    choices = _choices(plain)
    if choices:
        name = next(name for name, cls in choices.items() if _is_choice(value, cls))
        return {"type": name, **({} if value is None else dump(value))}
    if value is None:
        return NONE
    if _kinds(type(value)):
        return {"type": value._owner.type_name, **dump(value)}
    if dataclasses.is_dataclass(value):
        return dump(value)
    if isinstance(value, (list, tuple)):
        return [dump_value(Any, item) for item in value]
    if isinstance(value, dict):
        return {key: dump_value(Any, item) for key, item in value.items()}
    return value


def inline(value: Any) -> str:
    """A value of [model] as one line of TOML; a component with what differs from its defaults."""
    if value is None:
        return f'"{NONE}"'
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(inline(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {inline(item)}" for key, item in value.items()) + "}"
    if _kinds(type(value)):
        defaults = {field.name: field.default for field in dataclasses.fields(value)}
        changed = {
            key: item for key, item in dump(value).items() if getattr(value, key) != defaults[key]
        }
        return inline({"type": value._owner.type_name, **changed})
    return json.dumps(value)


def _is_choice(value: Any, cls: type | None) -> bool:
    return value is None if cls is None else type(value) is cls


def _kinds(cls: Any) -> dict[str, type | None]:
    """Names and Configs of the kinds of a component (aux losses, forced routing), if it has."""
    kinds = getattr(getattr(cls, "_owner", None), "kinds", {})
    return {name: kind.Config for name, kind in kinds.items()}


def _choices(hint: Any) -> dict[str, type | None]:
    """Names and classes of a choice of configs: of the kinds of a component, or None, or of
    a union that tyro offers as subcommands."""
    for member in _members(hint):
        if _kinds(member):
            return {**_kinds(member), **({NONE: None} if _allows_none(hint) else {})}
    named = {}
    for member in typing.get_args(hint) if _is_union(hint) else ():
        if typing.get_origin(member) is Annotated:
            cls, *metadata = typing.get_args(member)
            for item in metadata:
                name = getattr(item, "name", None)
                if isinstance(name, str):
                    named[name] = None if cls is type(None) else cls
    return named


def _dataclass_element(hint: Any) -> Any:
    for member in typing.get_args(hint) if _is_union(hint) else (hint,):
        if typing.get_origin(member) is list:
            element = typing.get_args(member)[0]
            if inspect.isclass(element) and dataclasses.is_dataclass(element):
                return element
    return None


def _without_annotation(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (Union, types.UnionType)


def _members(hint: Any) -> tuple:
    return typing.get_args(hint) if _is_union(hint) else (hint,)


def _literals(hint: Any) -> list[str]:
    return [
        choice
        for member in _members(hint)
        if typing.get_origin(member) is Literal
        for choice in typing.get_args(member)
        if isinstance(choice, str)
    ]


def _allows_none(hint: Any) -> bool:
    return type(None) in _members(hint)


def _allows_literal(hint: Any, choice: str) -> bool:
    return choice in _literals(hint)


def _accepts_bool(hint: Any) -> bool:
    return any(member in (bool, Any, object) for member in _members(hint))


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise JobError(f"{where} is {_show(value)}; it must be a table")
    return value


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}


def describe(hint: Any) -> str:
    """What a value of this annotation is, in words."""
    if _is_union(hint):
        return " or ".join(describe(member) for member in typing.get_args(hint))
    if hint is type(None):
        return f'"{NONE}"'
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) in (list, tuple):
        return "a list"
    if typing.get_origin(hint) is dict or hint is dict:
        return "a table"
    if _kinds(hint):
        return "a table with a type"
    return _NAMES.get(hint, str(hint))

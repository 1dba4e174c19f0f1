"""Strict conversion between TOML tables and dataclass configs.

A table sets fields of an existing config. An unknown key, a wrong type or a value outside a choice
raises ``JobError`` with the key and the nearest valid name. TOML has no null, so ``"none"`` means
None. A choice between configs (activation checkpointing, aux losses, the expert bias) is a table
with a ``type``.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tomli
import typeguard

from titan_moe_lb.errors import JobError, near, nearest

NONE = "none"

_NOT_IN_TOML = {"model_spec", "param_init", "sharding_config"}


def read(path: str, flag: str) -> dict[str, Any]:
    """Parse the file that the user's ``flag`` names.

    Raises:
        JobError: the file is missing, unreadable or not valid TOML.
    """
    try:
        return tomli.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise JobError(f"{flag} {path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{flag} {path}: cannot be read: {error}") from None
    except tomli.TOMLDecodeError as error:
        raise JobError(f"{flag} {path}: not valid TOML: {error}") from None


def merge(config: Any, table: Any, where: str) -> Any:
    """Set fields of a dataclass instance from a table, in place, and return the instance.

    Args:
        config: a dataclass instance; nested instances are set in place too.
        table: parsed TOML.
        where: beginning of each message, for example ``debug.toml: [training]``.

    Raises:
        JobError: the first key that does not fit.
    """
    for key, value in _table(table, where, _hints(type(config))).items():
        merge_field(config, key, value, f"{where} {key}")
    return config


def build(cls: type, table: Any, where: str) -> Any:
    """Build a dataclass instance from a table; see :func:`merge` for arguments and errors."""
    hints = _hints(cls)
    table = _table(table, where, hints)
    for field in settable(cls):
        if default(field) is dataclasses.MISSING and field.name not in table:
            raise JobError(f"{where} needs {field.name!r}")
    values = {key: construct(hints[key], value, f"{where} {key}") for key, value in table.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise JobError(f"{where}: {error}") from None


def merge_field(config: Any, name: str, value: Any, where: str) -> None:
    """Set one field of a dataclass instance; see :func:`merge` for arguments and errors."""
    hint = _hints(type(config))[name]
    setattr(config, name, construct(hint, value, where, getattr(config, name)))


def dump(config: Any) -> dict[str, Any]:
    """Return every field that a table can set, as TOML; the inverse of :func:`merge`."""
    return {
        name: dump_value(hint, getattr(config, name))
        for name, hint in _hints(type(config)).items()
        if not callable(getattr(config, name))
    }


def settable(cls: type) -> dict[dataclasses.Field, Any]:
    """Return the fields that TOML may set and their annotations, in order."""
    hints = typing.get_type_hints(cls, include_extras=True)
    hidden = _NOT_IN_TOML | getattr(getattr(cls, "_owner", None), "filled_by_job", frozenset())
    return {
        field: hints[field.name]
        for field in dataclasses.fields(cls)
        if field.name not in hidden and not field.name.startswith("_")
    }


def default(field: dataclasses.Field) -> Any:
    """Return the default of a field, or ``dataclasses.MISSING`` if it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def construct(hint: Any, value: Any, where: str, current: Any = None) -> Any:
    """Convert a TOML value to the type of an annotated parameter or field.

    Args:
        hint: the annotation.
        value: parsed TOML.
        where: as in :func:`merge`.
        current: its current value; a table sets fields of a current config.

    Raises:
        JobError: the value does not fit.
    """
    members = _members(hint)
    if isinstance(value, str) and value in _literals(members):
        return value
    choices = _choices(members)
    if choices:
        return _choose(current, choices, value, where)
    if value == NONE and type(None) in members:
        return None
    if dataclasses.is_dataclass(current):
        return merge(current, value, where)
    for member in members:
        if typing.get_origin(member) is list:
            (element,) = typing.get_args(member)
            if dataclasses.is_dataclass(element):
                return _list_of_configs(current or [], element, value, where)
    for member in members:
        if dataclasses.is_dataclass(member) and isinstance(value, dict):
            return build(typing.cast(type, member), value, where)
    if isinstance(current, dict) and isinstance(value, dict):
        # TOML has no tuples; AdamW's betas are one.
        tuples = {key for key, item in current.items() if isinstance(item, tuple)}
        return current | {k: tuple(v) if k in tuples else v for k, v in value.items()}
    return _checked(hint, value, where)


def _list_of_configs(current: list, element: Any, value: Any, where: str) -> list:
    """Rebuild kinds of a component; merge other configs into the current ones by position."""
    tables = value if isinstance(value, list) else [value]
    choices = _choices([element])
    if not tables and current and not choices:
        raise JobError(f"{where} is empty: remove it to keep the current value, or add an entry")
    entries = []
    for index, table in enumerate(tables):
        place = f"{where}[{index}]"
        if choices:
            entries.append(_choose(None, choices, table, place))
        elif index < len(current):
            entries.append(merge(current[index], table, place))
        else:
            entries.append(build(element, table, place))
    return entries if choices else entries + current[len(tables) :]


def _choose(current: Any, choices: dict[str, type | None], value: Any, where: str) -> Any:
    if isinstance(value, str):
        value = {"type": value}
    if not isinstance(value, dict):
        raise _wrong(where, value, "one table with a type")
    table = dict(value)
    name = table.pop("type", None)
    if name is None and current is not None:
        return merge(current, table, where)
    if name is None:
        raise JobError(f"{where} needs a type; valid: {', '.join(choices)}")
    if not isinstance(name, str) or name not in choices:
        raise JobError(f"{where} type {name!r} does not exist; {nearest(str(name), choices)}")
    cls = choices[name]
    if cls is None and table:
        raise JobError(f"{where} type {name!r} takes no further keys")
    return None if cls is None else build(cls, table, where)


def _checked(hint: Any, value: Any, where: str) -> Any:
    members = _members(hint)
    every = typeguard.CollectionCheckStrategy.ALL_ITEMS
    try:
        if isinstance(value, bool) and not {bool, Any, object} & set(members):
            raise typeguard.TypeCheckError("a bool is an int to Python")
        typeguard.check_type(value, hint, collection_check_strategy=every)
    except typeguard.TypeCheckError:
        literals = _literals(members)
        guess = near(value, literals) if isinstance(value, str) else ""
        raise _wrong(where, value, describe(hint) + guess) from None
    return value


def dump_value(hint: Any, value: Any) -> Any:
    """Convert a value to TOML; the inverse of :func:`construct`."""
    if value is None:
        return NONE
    if dataclasses.is_dataclass(value):
        choices = _choices(_members(hint)) or _choices([type(value)])
        kind = [("type", name) for name, cls in choices.items() if cls is type(value)]
        return {**dict(kind), **dump(value)}
    if isinstance(value, (list, tuple)):
        return [dump_value(Any, item) for item in value]
    if isinstance(value, dict):
        return {key: dump_value(Any, item) for key, item in value.items()}
    return value


def inline(value: Any) -> str:
    """Return a value of [model] as one line of TOML; a config without its defaults.

    Raises:
        JobError: it contains a date or a time.
    """
    if dataclasses.is_dataclass(value):
        usual = {field.name: default(field) for field in dataclasses.fields(value)}
        table = dump_value(Any, value)
        return inline({k: v for k, v in table.items() if getattr(value, k, v) != usual.get(k)})
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(inline(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {inline(item)}" for key, item in value.items()) + "}"
    try:
        return json.dumps(NONE if value is None else value)
    except TypeError:
        raise JobError(f"{value} is a date or a time, which no key of a job takes") from None


def describe(hint: Any) -> str:
    """Describe the valid values of an annotation, as in "an integer or a list"."""
    return " or ".join(_describe_member(member) for member in _members(hint))


_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    list: "a list",
    tuple: "a list",
    dict: "a table",
    type(None): f'"{NONE}"',
}


def _describe_member(member: Any) -> str:
    if typing.get_origin(member) is Literal:
        choices = [repr(choice) for choice in typing.get_args(member)]
        return ("one of " if len(choices) > 1 else "") + ", ".join(choices)
    if _choices([member]):
        return "a table with a type"
    if dataclasses.is_dataclass(member):
        return "a table"
    name = _NAMES.get(typing.get_origin(member) or member, str(member))
    items = typing.get_args(member) if typing.get_origin(member) is list else ()
    return f"{name}, each item {describe(items[0])}" if items else name


def _hints(cls: type) -> dict[str, Any]:
    return {field.name: hint for field, hint in settable(cls).items()}


def _members(hint: Any) -> tuple:
    """Return the members of a union, or the annotation itself."""
    plain = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
    union = typing.get_origin(plain) in (Union, types.UnionType)
    return typing.get_args(plain) if union else (plain,)


def _choices(members: Sequence) -> dict[str, type | None]:
    """Return names and classes of a choice of configs; empty if there is no choice.

    These are the kinds of a component (aux losses, expert bias, forced routing), or the members
    of a union that tyro offers as subcommands.
    """
    found: dict[str, type | None] = {}
    for member in members:
        kinds = getattr(getattr(member, "_owner", None), "kinds", {})
        found |= {name: kind.Config for name, kind in kinds.items()}
        if typing.get_origin(member) is Annotated:
            cls, *metadata = typing.get_args(member)
            names = [name for name in (getattr(m, "name", None) for m in metadata) if name]
            found |= dict.fromkeys(names, None if cls is type(None) else cls)
    if found and type(None) in members:
        found[NONE] = None
    return found


def _literals(members: Sequence) -> list[str]:
    literals = [m for m in members if typing.get_origin(m) is Literal]
    return [c for m in literals for c in typing.get_args(m) if isinstance(c, str)]


def _table(value: Any, where: str, valid: dict[str, Any]) -> dict[str, Any]:
    """Check that a value is a table and that each key is one of ``valid``."""
    if not isinstance(value, dict):
        raise _wrong(where, value, "a table")
    for key in value:
        if key not in valid:
            raise JobError(f"{where} has no key {key!r}; {nearest(key, valid)}")
    return value


def _wrong(where: str, value: Any, valid: str) -> JobError:
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    shown = text if len(text) <= 60 else text[:57] + "..."
    return JobError(f"{where} is {shown}; it must be {valid}")

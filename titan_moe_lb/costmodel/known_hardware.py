"""The device that a name stands for: of the table with sources, of a user's file, or this host."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import tomli

from titan_moe_lb import toml_tables
from titan_moe_lb.costmodel.hardware import FIGURES, Hardware
from titan_moe_lb.costmodel.host import measure_host
from titan_moe_lb.errors import JobError, nearest

HOST = "host"
"""The name that stands for this machine, measured."""


def hardware(name: str) -> Hardware:
    """The device of that name, of a TOML file of the user's, or this host, measured.

    Raises:
        JobError: neither a known name nor a file; a file that does not define a device.
    """
    if name == HOST:
        return measure_host()
    if name.endswith(".toml"):
        return _device(Path(name).stem, toml_tables.read(name, "--hardware"), name)
    table = known_hardware()
    key = name.lower().replace("-", "_")
    if key not in table:
        raise JobError(
            f"--hardware {name!r} is unknown; {nearest(key, [*table, HOST])} To define one, write "
            f"a file such as my.toml with {', '.join(('name', *FIGURES))} and give its path"
        )
    return _device(key, table[key], "hardware.toml")


def known_hardware() -> dict[str, dict[str, Any]]:
    """The table that comes with the package, by name."""
    text = resources.files("titan_moe_lb.costmodel").joinpath("hardware.toml").read_text()
    return tomli.loads(text)


def _device(key: str, table: dict[str, Any], place: str) -> Hardware:
    valid = ("name", "sources", *FIGURES)
    for figure in table:
        if figure not in valid:
            raise JobError(f"{place}: no figure {figure!r}; {nearest(figure, valid)}")
    missing = [figure for figure in FIGURES if figure not in table]
    if missing:
        raise JobError(f"{place}: {key!r} lacks {', '.join(missing)}")
    return Hardware(**{"name": key, **table})

"""Devices by name, from the package's table with sources or from a user's file."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import tomli

from titan_moe_lb import toml_tables
from titan_moe_lb.costmodel.hardware.device import SPECS, Hardware, Host
from titan_moe_lb.errors import JobError, nearest

USUAL = {
    "bf16_flops": (1e11, 1e17, "FLOP/s, as in 989e12"),
    "memory_bytes": (1e7, 1e14, "bytes, as in 80e9"),
    "memory_bandwidth": (1e9, 1e15, "bytes/s, as in 3.35e12"),
    "scale_up_domain": (1, 2**20, "devices, as in 8"),
    "scale_up_bandwidth": (1e7, 1e14, "bytes/s in one direction, as in 450e9"),
    "scale_up_latency": (1e-9, 1e-2, "seconds, as in 0.6e-6"),
    "scale_out_bandwidth": (1e7, 1e14, "bytes/s in one direction, as in 50e9"),
    "scale_out_latency": (1e-9, 1e-2, "seconds, as in 2.7e-6"),
}
"""Smallest and largest plausible value, and the unit. A file in TFLOP/s, GB or µs is outside."""

ASSUMED = {
    "scale_up_domain": 8,
    "scale_up_latency": 0.6e-6,
    "scale_out_bandwidth": 50e9,
    "scale_out_latency": 2.7e-6,
}
"""Values that a user's file may leave out: those of an H100 in a node of eight."""

KINDS = {"gpu": Hardware, "host": Host}


def hardware(name: str) -> Hardware:
    """Look up a device by its name, or read it from a user's TOML file.

    Raises:
        JobError: the name is unknown, or the file does not define a device.
    """
    if name.endswith(".toml"):
        return _device(Path(name).stem, toml_tables.read(name, "--hardware"), name)
    table = known_hardware()
    key = name.lower().replace("-", "_")
    if key not in table:
        raise JobError(
            f"--hardware {name!r} is unknown; {nearest(key, table)} To define one, write "
            f"a file such as my.toml with {', '.join(('name', *SPECS))} and give its path"
        )
    return _device(key, table[key], "devices.toml")


def known_hardware() -> dict[str, dict[str, Any]]:
    """Read the package's table of devices, by name."""
    text = resources.files("titan_moe_lb.costmodel.hardware").joinpath("devices.toml").read_text()
    return tomli.loads(text)


def _device(key: str, table: dict[str, Any], place: str) -> Hardware:
    """Build a device from its table; report all mistakes at once."""
    kind, sources = table.get("kind", "gpu"), table.get("sources", {})
    assumed = {} if kind == "host" else {k: v for k, v in ASSUMED.items() if k not in table}
    mistakes = []
    valid = ("name", "sources", "kind", *SPECS)
    for figure in table:
        if figure not in valid:
            mistakes.append(f"unknown key {figure!r}; {nearest(figure, valid)}")
    missing = [figure for figure in SPECS if figure not in table and figure not in assumed]
    if missing:
        mistakes.append(f"{table.get('name', key)!r} lacks {', '.join(missing)}")
    if not isinstance(kind, str) or kind not in KINDS:
        mistakes.append(f"kind is {kind!r}; {nearest(str(kind), KINDS)}")
    if not isinstance(sources, dict):
        mistakes.append(
            f'sources is {sources!r}; it is a table, as in {{bf16_flops = "data sheet"}}'
        )
    # The file of a host is measured in these units, and a host may be slower than any accelerator.
    for figure, (least, most, unit) in (USUAL if kind == "gpu" else {}).items():
        value = table.get(figure)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if not least <= value <= most:
            mistakes.append(
                f"{figure} is {value!r}; it is in {unit}, and usually from {least:g} to {most:g}"
            )
    if mistakes:
        raise JobError(f"{place}: {'. Also: '.join(mistakes)}")
    sources = {**sources, **dict.fromkeys(assumed, "assumed, as of h100")}
    values = {"name": key, **assumed, **table, "sources": sources}
    values.pop("kind", None)
    return KINDS[kind](**values)

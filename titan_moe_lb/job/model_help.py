"""Help of our own flags and of [model], which ``--help`` prints before torchtitan's flags."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import docstring_parser
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from model_registry.entry import Default
from titan_moe_lb import toml_tables
from titan_moe_lb.balancing.component import first_paragraph
from titan_moe_lb.balancing.expert_bias import ExpertBias
from titan_moe_lb.balancing.forced_routing import ForcedRouting
from titan_moe_lb.balancing.losses import AuxLoss
from titan_moe_lb.balancing.value_schedule import Change
from titan_moe_lb.job import catalog, job_config, module_lookup
from titan_moe_lb.job.own_flags import OWN_FLAGS
from titan_moe_lb.wiring.model_spec import balanced

_COMPONENTS: dict[str, dict[str, type]] = {
    'Losses, as in aux_losses = [{type = "z_loss", weight = 1e-4}]:': AuxLoss.kinds,
    'Expert bias, as in expert_bias = {type = "sign", speed = 1e-3}:': ExpertBias.kinds,
    "Forced routing of a benchmark, as in "
    'forced_routing = {type = "hot_rank", rank = 0, fraction = 0.5}:': ForcedRouting.kinds,
}


def show(module: str, console: Console | None = None) -> None:
    """Print our flags, the keys of [model], and every kind of loss, bias rule and strategy."""
    console = console or Console(highlight=False)
    print(OWN_FLAGS)
    registry = module_lookup.config_registry(module)
    package = module_lookup.model_package(registry)
    entry = job_config.registry_entry(registry)
    console.print(Text(f"[model] of {module}, on the command line --model.KEY VALUE:"))
    console.print(_indented(_model_keys(entry, getattr(package, "DEFAULTS", ()))))
    console.print(_indented(catalog.defaults(package)))
    for heading, kinds in _COMPONENTS.items():
        console.print(Text(heading))
        for name, kind in kinds.items():
            console.print(Text(f'  type = "{name}": {first_paragraph(kind)}'))
            console.print(_indented(_keys(kind.Config), by=4))  # type: ignore[attr-defined]
    console.print(Text("Changes, as in changes = [{step = 1000, value = 0.0}]:"))
    console.print(_indented(_keys(Change)))
    console.print(Text("Flags of torchtitan:"))


def _model_keys(entry: Callable, defaults: Sequence[Default]) -> Table:
    described = _arguments(balanced) | _arguments(entry)
    by_flavor = {default.key for default in defaults if default.flavors}
    table = _table()
    for name, hint in job_config.model_keys(entry).items():
        default = inspect.signature(entry).parameters[name].default
        value = "default of the flavor, below" if name in by_flavor else _default(default)
        _add(table, name, hint, value, described.get(name, ""))
    return table


def _keys(cls: type) -> Table:
    described = {
        param.arg_name: param.description
        for base in reversed(cls.__mro__[:-1])
        for param in docstring_parser.parse_from_object(base).params
    }
    table = _table()
    for field, hint in toml_tables.settable(cls).items():
        value = _default(toml_tables.default(field))
        _add(table, field.name, hint, value, described.get(field.name))
    return table


def _add(table: Table, name: str, hint: Any, value: str, text: str | None) -> None:
    words = " ".join((text or "").split())
    table.add_row(Text(name), Text(f"{toml_tables.describe(hint)}; {value}"), Text(words))


def _default(value: Any) -> str:
    required = value in (inspect.Parameter.empty, dataclasses.MISSING)
    return "required" if required else f"default {toml_tables.inline(value)}"


def _arguments(function: Callable) -> dict[str, str | None]:
    """Return the ``Args`` section of a docstring by name; several names may share a text."""
    parsed = docstring_parser.parse(inspect.getdoc(function) or "")
    return {
        name: param.description for param in parsed.params for name in param.arg_name.split(", ")
    }


def _table() -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    for ratio in (3, 4):
        table.add_column(ratio=ratio, overflow="fold")
    return table


def _indented(table: RenderableType, by: int = 2) -> Padding:
    return Padding(table, (0, 0, 1, by), expand=False)

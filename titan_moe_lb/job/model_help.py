"""What a job can set about its model: the part of ``--help`` that torchtitan does not know."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from titan_moe_lb import toml_tables
from titan_moe_lb.forced_routing import ForcedRouting
from titan_moe_lb.job import job_config, module_lookup
from titan_moe_lb.job.catalog import first_paragraph
from titan_moe_lb.losses import AuxLoss


def show(module: str, console: Console | None = None) -> None:
    """Print our flags, the keys of [model], the losses and the forced strategies."""
    console = console or Console(highlight=False)
    print(job_config.OWN_FLAGS)
    entry = job_config.registry_entry(module_lookup.config_registry(module))
    console.print(Text(f"[model] of {module}, on the command line --model.KEY VALUE:"))
    console.print(_indented(_model_keys(entry)))
    console.print(Text('Losses, as in aux_losses = [{type = "z_loss", weight = 1e-4}]:'))
    _show_kinds(console, AuxLoss.kinds)
    example = '{type = "hot_rank", rank = 0, fraction = 0.5}'
    console.print(Text(f"Forced routing of a benchmark, as in forced_routing = {example}:"))
    _show_kinds(console, ForcedRouting.kinds)
    console.print(Text("Flags of torchtitan:"))


def _show_kinds(console: Console, kinds: Mapping[str, type]) -> None:
    for name, kind in kinds.items():
        console.print(Text(f'  type = "{name}": {first_paragraph(kind)}'))
        console.print(_indented(_component_keys(kind), by=4))


def _model_keys(entry: Callable) -> Table:
    described = _described_arguments(inspect.getdoc(entry) or "")
    table = _table()
    for name, hint in job_config.model_keys(entry).items():
        default = inspect.signature(entry).parameters[name].default
        _add(table, name, hint, default, described.get(name, ""))
    return table


def _component_keys(kind: Any) -> Table:
    table = _table()
    for field, hint in toml_tables.settable(kind.Config).items():
        _add(table, field.name, hint, field.default, _field_docstring(kind.Config, field.name))
    return table


def _add(table: Table, name: str, hint: Any, default: Any, text: str) -> None:
    required = default in (inspect.Parameter.empty, dataclasses.MISSING)
    value = "required" if required else f"default {toml_tables.inline(default)}"
    table.add_row(Text(name), Text(f"{toml_tables.describe(hint)}; {value}"), Text(text))


def _described_arguments(docstring: str) -> dict[str, str]:
    """The ``Args`` section: ``name, name: text`` with the text indented further."""
    section = re.search(r"^Args:\n((?: .*\n|\n)*)", docstring + "\n", re.MULTILINE)
    if section is None:
        return {}
    entries = re.split(r"\n(?=\S)", textwrap.dedent(section[1]).strip("\n"))
    described = {}
    for entry in entries:
        names, _, text = " ".join(entry.split()).partition(": ")
        described.update(dict.fromkeys(names.split(", "), text))
    return described


def _field_docstring(cls: type, name: str) -> str:
    """The string under a field, in the class that declares it."""
    for base in cls.__mro__:
        if name in base.__dict__.get("__annotations__", {}):
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            assert isinstance(definition, ast.ClassDef)
            body = definition.body
            for statement, following in zip(body, body[1:], strict=False):
                if (
                    isinstance(statement, ast.AnnAssign)
                    and getattr(statement.target, "id", None) == name
                    and isinstance(following, ast.Expr)
                    and isinstance(following.value, ast.Constant)
                ):
                    return " ".join(str(following.value.value).split())
    return ""


def _table() -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    for ratio in (3, 4):
        table.add_column(ratio=ratio, overflow="fold")
    return table


def _indented(table: Table, by: int = 2) -> Padding:
    return Padding(table, (0, 0, 1, by), expand=False)

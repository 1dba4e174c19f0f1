"""What can be trained: ``--list``."""

from __future__ import annotations

import importlib
import inspect
import os
from pathlib import Path
from types import ModuleType

import tomli
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from titan_moe_lb import toml_tables
from titan_moe_lb.job import module_lookup

CONFIGS = Path(__file__).parents[2] / "configs"
"""The job files of the repository; not part of an installed package."""


def show(console: Console | None = None) -> None:
    """Print every room of ``model_registry``: flavors, config functions, jobs, defaults."""
    console = console or Console(highlight=False)
    for name in module_lookup.registered_models():
        room = importlib.import_module(f"model_registry.{name}")
        registry = module_lookup.config_registry(name)
        console.print(Text(f"--module {name}", style="bold"))
        parts = [
            Text(first_paragraph(room)),
            Text(f"flavors: {', '.join(room.FLAVORS)}"),
            _configs(registry),
            _jobs(name),
            _defaults(room),
        ]
        for part in parts:
            console.print(Padding(part, (0, 0, 1, 2), expand=False))


def _configs(registry: ModuleType) -> Table:
    table = _table("--config", "")
    for name in module_lookup.config_names(registry):
        default = " (default)" if name == getattr(registry, "debug_config", "") else ""
        table.add_row(Text(name), Text(first_paragraph(getattr(registry, name)) + default))
    return table


def _jobs(name: str) -> Table | Group:
    table = _table(f"--job-config {os.path.relpath(CONFIGS / name)}/...", "ranks", "")
    for path in sorted((CONFIGS / name).glob("*.toml")):
        job = tomli.loads(path.read_text()).get("job", {})
        ranks, description = job.get("ranks", ""), job.get("description", "")
        table.add_row(Text(path.name), Text(str(ranks)), Text(description))
    return table if table.row_count else Group()


def _defaults(room: ModuleType) -> Table:
    table = _table("[model] default", "source")
    for default in room.DEFAULTS:
        line = f"{default.key} = {toml_tables.inline(default.value)}"
        table.add_row(Text(line), Text(default.source))
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(Text(column), overflow="fold")
    return table


def first_paragraph(documented: object) -> str:
    """Of the docstring, as one line."""
    return " ".join((inspect.getdoc(documented) or "").partition("\n\n")[0].split())

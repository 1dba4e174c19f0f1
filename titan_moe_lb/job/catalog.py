"""Catalog of models and jobs, which ``--list`` prints."""

from __future__ import annotations

import importlib
from types import ModuleType

import tomli
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from model_registry.entry import Default, defaults_of
from titan_moe_lb import toml_tables
from titan_moe_lb.balancing.component import first_paragraph
from titan_moe_lb.job import job_files, module_lookup


def show(console: Console | None = None) -> None:
    """Print every model of ``model_registry``: flavors, config functions, jobs, defaults."""
    console = console or Console(highlight=False)
    for name in module_lookup.registered_models():
        package = importlib.import_module(f"model_registry.{name}")
        registry = module_lookup.config_registry(name)
        console.print(Text(f"--module {name}", style="bold"))
        parts = [
            Text(first_paragraph(package)),
            Text(f"flavors: {', '.join(package.FLAVORS)}"),
            _configs(registry),
            _jobs(name),
            defaults(package),
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
    table = _table("--job-config", "ranks", "")
    table.columns[0].no_wrap = True  # users copy these names
    for job_name in job_files.names(name):
        job = tomli.loads(job_files.find(job_name).read_text()).get("job", {})
        ranks, description = job.get("ranks", ""), job.get("description", "")
        table.add_row(Text(job_name), Text(str(ranks)), Text(description))
    return table if table.row_count else Group()


def defaults(package: ModuleType) -> Table | Group:
    """Return a table of the defaults of [model], with their flavors and sources."""
    table = _table("flavors", "[model] default, and its source")
    for default in getattr(package, "DEFAULTS", ()):
        line = Text(f"{default.key} = {toml_tables.inline(default.value)}")
        source = Text(default.source, style="dim")
        table.add_row(Text(flavors_with(package, default)), Group(line, source))
    return table if table.row_count else Group()


def flavors_with(package: ModuleType, default: Default) -> str:
    """Name the flavors of a model package that use a default of it."""
    taking = [
        flavor
        for flavor in package.FLAVORS
        if defaults_of(package.DEFAULTS, flavor).get(default.key) is default
    ]
    return "all" if len(taking) == len(package.FLAVORS) else ", ".join(taking)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(Text(column), overflow="fold")
    return table

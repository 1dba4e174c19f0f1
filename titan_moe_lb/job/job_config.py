"""Strict conversion of a TOML file and a command line to the config of a job.

The command line takes precedence over TOML, and TOML over the registry. The sections of the file
mirror ``Trainer.Config``. ``[job]`` names the config function to start from. ``[model]`` contains
the arguments of the model's registry entry; ``--model.KEY VALUE`` sets one, with VALUE in TOML
syntax.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import tomli_w
from torchtitan.config import ConfigManager
from torchtitan.trainer import Trainer

from titan_moe_lb import rules, toml_tables
from titan_moe_lb.balancing.anticipatory_routing.trainer import with_forward_ahead
from titan_moe_lb.errors import JobError, nearest
from titan_moe_lb.job import job_files, module_lookup, renamed_keys
from titan_moe_lb.job.own_flags import DEFAULT_MODULE, CommandLine, parse_command_line
from titan_moe_lb.parallel import single_process
from titan_moe_lb.parallel.layer_numbers import layer_name
from titan_moe_lb.resolved_job import Job
from titan_moe_lb.telemetry.metrics_processor import adapt
from titan_moe_lb.wiring.model_spec import BalancedModelSpec, balanced

# Arguments of a registry entry that [job] or Python sets.
_NOT_IN_MODEL_TABLE = ("flavor", "converters", "spec")


@dataclass(kw_only=True)
class JobTable:
    """Table ``[job]``: the config function of the job, and its processes."""

    module: str = ""
    """Model or importable path, as in ``--module``; empty: the default model."""
    config: str = ""
    """Config function, as in ``--config``; empty: the model's debug job."""
    flavor: str = ""
    """Flavor of the model, instead of ``config``."""
    description: str = ""
    imports: list[str] = field(default_factory=list)
    """Modules with a user's own losses, bias rules, metrics or strategies, imported before the
    model is built: files beside the job file, or any importable path."""
    ranks: int | None = None
    """Number of processes of the job on all nodes; None: any."""
    max_restarts: int = 0
    """How often to restart all processes after one of them has failed."""


@dataclass(kw_only=True)
class Draft:
    """Job with a config function, before its config is built.

    Attributes:
        command: the command line.
        table: ``[job]``, with module and config function filled in.
        tables: the other tables of the job file.
        source: the job file, or "command line"; begins each message.
    """

    command: CommandLine
    table: JobTable
    tables: dict[str, Any]
    source: str

    def build(self) -> Trainer.Config:
        """Build the config of registry, TOML and ``--model.*``, without torchtitan's own flags."""
        registry = module_lookup.config_registry(self.table.module)
        config = module_lookup.config_function(registry, self.table.config)()
        if not isinstance(config, Trainer.Config):
            raise JobError(
                f"{registry.__name__}.{self.table.config} does not return a Trainer.Config"
            )
        if config.model_spec is None:
            raise JobError(
                f"{registry.__name__}.{self.table.config} returns a Trainer.Config without a "
                "model_spec: set it, as in titan_moe_lb.balanced(spec, aux_losses=[...])"
            )
        tables = dict(self.tables)
        model = tables.pop("model", {})
        if model or self.command.model:
            _rebuild_model(config, registry, model, f"{self.source}: [model]", self.command.model)
        if isinstance(config.model_spec, BalancedModelSpec):
            adapt(config)
        _merge_sections(config, tables, self.source)
        return with_forward_ahead(config)

    def resolve(self, world_size: int) -> Job:
        """Build the config, apply torchtitan's own flags and validate the job."""
        try:
            # replace() runs the checks that torchtitan makes when a config is constructed.
            built = dataclasses.replace(self.build())
            renamed_keys.refuse(self.command.rest, built)
            config = _ResolvedConfigManager(built).parse_args(self.command.rest)
            job = Job.of(config, world_size)
            rules.validate(job)
            job.bound  # noqa: B018  runs torchtitan's checks of the model before it is built
        except JobError:
            raise
        except (AssertionError, ValueError, NotImplementedError) as error:
            raise JobError(f"{self.source}: {_for_users(str(error))}") from None
        return job


def draft(arguments: list[str] | CommandLine) -> Draft:
    """Read the command line and the job file."""
    command = arguments if isinstance(arguments, CommandLine) else parse_command_line(arguments)
    source = command.job_config or "command line"
    tables = {}
    if command.job_config:
        tables = toml_tables.read(str(job_files.find(command.job_config)), "--job-config")
    renamed_keys.refuse_older_file(tables, source)
    if command.job_config and "job" not in tables and not (command.module or command.config):
        raise JobError(
            f"--job-config {source} names no model: begin it with one, as in "
            f'[job] module = "{DEFAULT_MODULE}"'
        )
    table = JobTable()
    job = tables.pop("job", {})
    if not isinstance(job, dict):
        raise JobError(f"{source}: [job] must be a table")
    toml_tables.merge(table, job, f"{source}: [job]")
    if table.imports:
        module_lookup.import_all(table.imports, job_files.find(source).parent, f"{source}: [job]")
    if command.module and command.module != table.module:
        # Another model: drop the file's config function, which belongs to the file's module.
        table = dataclasses.replace(table, module=command.module, config="", flavor="")
    if command.max_restarts is not None:
        if not command.max_restarts.isdecimal():
            raise JobError(f"--max-restarts is {command.max_restarts!r}; it must be a whole number")
        table = dataclasses.replace(table, max_restarts=int(command.max_restarts))
    if command.config:
        table = dataclasses.replace(table, config=command.config, flavor="")
    return Draft(command=command, table=_complete(table, source), tables=tables, source=source)


def load(arguments: list[str], world_size: int | None = None) -> Job:
    """Read and resolve a job; see :meth:`Draft.resolve`.

    Without ``world_size`` it is that in the environment of this process.
    """
    return draft(arguments).resolve(world_size or single_process.world_size())


def render(table: JobTable, config: Trainer.Config) -> str:
    """Return the job as TOML that resolves to the same job."""
    sections = toml_tables.dump(config)
    spec = config.model_spec
    if isinstance(spec, BalancedModelSpec):
        registry = module_lookup.config_registry(table.module)
        hints = model_keys(registry_entry(registry))
        sections["model"] = {
            name: toml_tables.dump_value(hints[name], value)
            for name, value in spec.arguments.items()
            if name in hints
        }
    job_table = {name: value for name, value in dataclasses.asdict(table).items() if value}
    text = tomli_w.dumps({"job": job_table, **sections})
    if sections.get("model", {}).get("aux_losses"):
        rows = config.training.local_batch_size
        text += f"\n# Filled by the job in each of aux_losses: local_batch_size = {rows}\n"
    return text


def _complete(table: JobTable, source: str) -> JobTable:
    """Check [job], and fill in module and config function."""
    if table.config and table.flavor:
        raise JobError(f"{source}: [job] names both config and flavor; keep one")
    if table.ranks is not None and table.ranks < 1:
        raise JobError(f"{source}: [job] ranks is {table.ranks}; it must be at least 1")
    if table.max_restarts < 0:
        raise JobError(
            f"{source}: [job] max_restarts is {table.max_restarts}; it must be at least 0"
        )
    module = table.module or DEFAULT_MODULE
    config = table.config
    if not config:
        registry = module_lookup.config_registry(module)
        if table.flavor:
            config = module_lookup.config_of_flavor(registry, table.flavor)
        else:
            config = getattr(registry, "debug_config", "")
        if not config:
            raise JobError(
                f"--module {module} has no debug job: name a config with --config; "
                f"{nearest('', module_lookup.config_names(registry))}"
            )
    return dataclasses.replace(table, module=module, config=config, flavor="")


def _merge_sections(config: Trainer.Config, tables: dict[str, Any], source: str) -> None:
    names = toml_tables.dump(config)
    for name, value in tables.items():
        if name not in names:
            kind = f"section [{name}]" if isinstance(value, dict) else f"top-level key {name!r}"
            raise JobError(f"{source}: no {kind}; {nearest(name, ['job', 'model', *names])}")
        place = f"[{name}]" if isinstance(value, dict) else name
        toml_tables.merge_field(config, name, value, f"{source}: {place}")


def _rebuild_model(
    config: Trainer.Config, registry, table: Any, where: str, overrides: dict[str, Any]
) -> None:
    """Build the model again with the arguments of [model] and ``--model.*``."""
    spec = config.model_spec
    assert spec is not None
    entry = registry_entry(registry)
    hints = model_keys(entry)
    arguments = dict(spec.arguments) if isinstance(spec, BalancedModelSpec) else {}
    if entry is balanced:  # the model already contains the other arguments of its registry entry
        arguments = {name: value for name, value in arguments.items() if name in hints}
    for place, values in ((where, table), ("--model", overrides)):
        if not isinstance(values, dict):
            raise JobError(f"{place} must be a table")
        for name, value in values.items():
            if name == "flavor":
                raise JobError(f"{place} flavor: choose the flavor in [job] flavor or config")
            if name == "load_balance_coeff":  # torchtitan's name for the speed of its one rule
                raise JobError(
                    f"{place} {name}: a job has one rule of the expert bias, and it is set in "
                    f'expert_bias, as in expert_bias = {{type = "sign", speed = {value}}}'
                )
            if name not in hints:
                raise JobError(f"{place} has no key {name!r}; {nearest(name, hints)}")
            arguments[name] = toml_tables.construct(hints[name], value, f"{place} {name}")
    if entry is balanced:
        config.model_spec = balanced(spec, **arguments)
        return
    config.model_spec = entry(**arguments)
    loss_config = getattr(registry, "loss_config", None)
    if loss_config is not None:
        config.loss = loss_config(config.model_spec)


def _for_users(text: str) -> str:
    """Turn a message of torchtitan into one line, with our names of the layers."""
    line = " ".join(text.split()).removeprefix("Config: ")
    return re.sub(r"\bmodel_spec\.model(\.\w+)+", lambda found: layer_name(found[0]), line)


def model_keys(entry: Callable[..., BalancedModelSpec]) -> dict[str, Any]:
    """Return the keys of [model] and their annotations."""
    hints = typing.get_type_hints(entry, include_extras=True)
    return {
        name: hints[name]
        for name in inspect.signature(entry).parameters
        if name not in _NOT_IN_MODEL_TABLE
    }


def registry_entry(registry) -> Callable[..., BalancedModelSpec]:
    """Return the function whose arguments [model] sets."""
    entry = module_lookup.entry_point(registry)
    if entry is not None and "aux_losses" in inspect.signature(entry).parameters:
        return entry
    return balanced


class _ResolvedConfigManager(ConfigManager):
    """Config manager of torchtitan that applies flags to an existing config."""

    def __init__(self, config: Trainer.Config) -> None:
        super().__init__()
        self._loaded = config

    def _load_config(self, args: list[str]) -> tuple[object, list[str]]:
        return self._loaded, args

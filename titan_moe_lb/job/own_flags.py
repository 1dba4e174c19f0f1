"""Our own flags of a job; the others belong to torchtitan's config.

Help is instant: this module imports neither torch nor torchtitan.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import tomli

from titan_moe_lb.errors import JobError
from titan_moe_lb.job import job_files

DEFAULT_MODULE = "deepseek_v3"

OWN_FLAGS = f"""\
Flags of titan_moe_lb:
  --list              print the models, their jobs and their defaults, and stop
  --module NAME       model (model_registry/NAME) or any importable path;
                      default {DEFAULT_MODULE}
  --config NAME       config function of the module; default: its debug job
  --job-config JOB    job as TOML, a file or a name of --list; the flags below beat it
  --model.KEY VALUE   argument of the model's registry entry, VALUE in TOML syntax:
                      --model.aux_losses '[{{type = "z_loss", weight = 1e-4}}]'
  --max-restarts N    when a process fails, start all of them again from the last
                      checkpoint, N times at most; default 0
  --print-config      print the resolved job as TOML and stop
"""

_VALUES = ("module", "config", "job_config", "max_restarts")
_CHECKPOINTING = "activation_checkpoint.type"
_SWITCHES = {"print_config": "print_config", "list": "list_models"}


@dataclass(kw_only=True)
class CommandLine:
    """Our own arguments; ``rest`` contains the flags of torchtitan's config."""

    module: str | None = None
    config: str | None = None
    job_config: str | None = None
    max_restarts: str | None = None
    print_config: bool = False
    list_models: bool = False
    model: dict[str, Any] = field(default_factory=dict)
    rest: list[str] = field(default_factory=list)


def parse_command_line(arguments: list[str]) -> CommandLine:
    """Separate our own flags from torchtitan's; ``--flag value`` and ``--flag=value`` are valid."""
    command = CommandLine()
    remaining = list(arguments)
    if remaining and (remaining[0] in job_files.names() or remaining[0].endswith(".toml")):
        raise JobError(f"{remaining[0]!r} is no flag: did you mean --job-config {remaining[0]}?")
    checkpointing = ""
    while remaining:
        argument = remaining.pop(0)
        name, has_value, value = argument.partition("=")
        key = name.removeprefix("--").replace("-", "_")
        ours = name.startswith("--") and (
            key in (*_VALUES, *_SWITCHES, _CHECKPOINTING) or key.startswith("model.")
        )
        if name == "--flavor":
            raise JobError("--flavor is a key of [job] in a job file; here --config chooses it")
        if not ours:
            command.rest.append(argument)
        elif key in _SWITCHES:
            if has_value:
                raise JobError(f"{name} takes no value, not even {value!r}")
            setattr(command, _SWITCHES[key], True)
        else:
            if not has_value:
                if not remaining:
                    raise JobError(f"{name} needs a value")
                value = remaining.pop(0)
            if not value:  # of a shell variable that is not set
                raise JobError(f"{name} is empty: give it a value, or leave it out")
            if key == _CHECKPOINTING:
                checkpointing = value
            elif key.startswith("model."):
                command.model[key.removeprefix("model.")] = _toml_value(name, value)
            else:
                setattr(command, key, value)
    if checkpointing:  # torchtitan has a subcommand of each type, which ends the flags
        command.rest.append(f"activation-checkpoint:{checkpointing}")
    return command


def _toml_value(flag: str, text: str) -> Any:
    try:
        return tomli.loads(f"value = {text}")["value"]
    except tomli.TOMLDecodeError:
        if text.replace("_", "").replace("-", "").isalnum():
            return text  # a bare word is a string
        raise JobError(f"{flag} {text!r}: not a TOML value") from None

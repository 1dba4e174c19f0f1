"""Help of our own flags of a job. This module imports nothing, so that help is instant."""

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

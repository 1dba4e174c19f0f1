"""Tests of imports: importing a name, building a spec or reading a job leaves the process
unchanged."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import titan_moe_lb

UPSTREAM = ("torchtitan", "torch", "spmd_types")

STATE = '''
import gc, importlib, logging, os, sys, warnings

def state(upstream):
    """All that is compared. Values are compared by identity where they are objects."""
    found = {f"os.environ {name}": value for name, value in os.environ.items()}
    found["gc"] = (gc.get_freeze_count(), gc.isenabled(), gc.get_threshold())
    found["logging"] = (logging.raiseExceptions, logging.root.manager.disable, logging.lastResort)
    found["logger class"] = logging.getLoggerClass()
    found["warnings"] = tuple(map(id, warnings.filters))
    loggers = {"root": logging.root, **logging.root.manager.loggerDict}
    for name, logger in loggers.items():
        if isinstance(logger, logging.Logger):
            kept = logger.level, logger.propagate, logger.disabled
            found[f"logger {name}"] = (*kept, *map(id, [*logger.handlers, *logger.filters]))
    import torch
    found["donated buffers"] = torch._functorch.config.donated_buffer
    found["compile cache"] = torch.compiler.config.cache_key_tag
    found["DTensor"] = len(torch.distributed.tensor.DTensor._op_dispatcher._custom_op_handlers)
    for name in upstream:
        for attribute, value in vars(sys.modules[name]).items():
            # Neither a submodule nor the namespace of our own operators.
            if f"{name}.{attribute}" not in sys.modules and attribute != "titan_moe_lb":
                found[f"{name}.{attribute}"] = id(value)
    return found

def is_silent(name, value):
    """A logger that was made and not set."""
    return name.startswith("logger ") and value == (logging.NOTSET, True, False)
'''

PUBLIC = "import titan_moe_lb as lb; lb.attach, lb.balanced, lb.trainer_config"
SPEC = "from torchtitan.models.qwen3 import model_registry; lb.balanced(model_registry('debugmodel_moe'))"
JOB = "lb.trainer_config('--job-config', 'qwen3/pp2_zbv')"

BUILT = f"""{PUBLIC}
import os, torch
from torchtitan.config import TrainingConfig
from model_registry.qwen3 import model_registry
model, dims, context = lb.build_model(
    model_registry("tiny"), training=TrainingConfig(seq_len=64), seed=0
)
balance = lb.attach(model, torch.optim.SGD(model.parameters()), dims, rows_per_step=1)
tokens, positions = torch.randint(256, (1, 64)), torch.arange(64)[None]
with context():
    masks = model.get_attention_masks(positions)
    model(tokens, attention_masks=masks, positions=positions).float().square().mean().backward()
balance.close_step()
assert balance.metrics()["moe/max_violation"] > 0
print(*(name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT") if name in os.environ))
"""


def run(program: str, **variables: str) -> list[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    environment |= variables
    command = [sys.executable, "-W", "ignore", "-c", program]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return said.stdout.splitlines()


@pytest.fixture(scope="module")
def loaded() -> tuple[list[str], list[str]]:
    """Public names, which load nothing until they are used, and the modules of torch and torchtitan
    that they load, with a spec and a job."""
    said = run(
        f"""
import sys, titan_moe_lb as lb
assert not {{"torch", "torchtitan"}} & set(sys.modules)
assert all(getattr(lb, name) for name in dir(lb))
print(*dir(lb))
{SPEC}
{JOB}
print(*(name for name in sys.modules if name.split(".")[0] in {UPSTREAM}))
""",
        WORLD_SIZE="2",
    )
    return said[0].split(), said[-1].split()


def test_process_is_left_as_it_was_found(loaded):
    used, upstream = "\n".join((PUBLIC, SPEC, JOB)), loaded[1]
    assert "torchtitan.tools.utils" in upstream and "torch.distributed.tensor" in upstream
    changed = run(
        f"""{STATE}
for name in {upstream}:
    try:
        importlib.import_module(name)
    except ImportError:  # made by a module, not by a file
        pass
upstream = [name for name in {upstream} if name in sys.modules]
before = state(upstream)
{used}
after = state(upstream)
for name in sorted(before.keys() | after.keys()):
    if before.get(name) != after.get(name) and not is_silent(name, after.get(name)):
        print(name)
""",
        WORLD_SIZE="2",
    )
    assert changed == []


def test_model_is_built_and_trained_in_a_process_that_is_not_prepared():
    """No launcher variable is left, which child processes would inherit."""
    assert run(BUILT)[-1] == ""


def test_job_is_built_and_trained_in_a_process_that_is_not_prepared(tmp_path):
    job = "'--module=qwen3', '--config=qwen3_tiny', '--training.steps=1', '--training.seq_len=64'"
    run(f"{PUBLIC}\nlb.trainer_config({job}, '--dump_folder={tmp_path}').build().train()")
    assert (tmp_path / "moe_load.arrow").exists()


def test_refused_command_says_one_line():
    """torch prints nothing after it when the interpreter ends."""
    command = [sys.executable, "-m", "titan_moe_lb.cli", "train", "--model.expert_bias=nope"]
    ended = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1


def test_public_face_is_imported_when_it_is_used(loaded):
    """Help must be instant."""
    assert {"balanced", "SequenceWiseAuxLoss", "SignBias", "FrozenBias", "HotRank"} <= {*loaded[0]}
    with pytest.raises(AttributeError, match="blanced"):
        titan_moe_lb.blanced  # noqa: B018

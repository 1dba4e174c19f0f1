"""Keys of a job that have another name in other trainers or versions of torchtitan."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

from titan_moe_lb.errors import JobError

_LEARNING_RATE = "optimizer.param_groups.0.optimizer_kwargs.lr"
_BIAS = """model.expert_bias, as in expert_bias = {type = "sign", speed = 1e-3}"""

RENAMED = {
    "activation_checkpoint.mode": "activation_checkpoint, as in activation-checkpoint:selective "
    'on the command line and type = "selective" in its table',
    "batch_size": "training.local_batch_size",
    "checkpoint.enable_checkpoint": "checkpoint.enable",
    "learning_rate": _LEARNING_RATE,
    "load_balance_coeff": _BIAS,
    "lr": _LEARNING_RATE,
    "optimizer.eps": "optimizer.param_groups.0.optimizer_kwargs.eps",
    "optimizer.lr": _LEARNING_RATE,
    "optimizer.name": "optimizer.param_groups.0.optimizer_name",
    "optimizer.weight_decay": "optimizer.param_groups.0.optimizer_kwargs.weight_decay",
    "profiling.enable_profiling": "profiler.enable_profiling",
    "seed": "debug.seed",
    "seq_len": "training.seq_len",
    "steps": "training.steps",
    "training.batch_size": "training.local_batch_size",
    "training.compile": "compile.enable",
    "training.dataset": "dataloader.dataset",
    "training.dataset_path": "dataloader.dataset_path",
    "training.deterministic": "debug.deterministic",
    "training.num_tokens_per_train_step": "training.global_batch_size, in sequences of "
    "training.seq_len tokens",
    "training.seed": "debug.seed",
    "validation.enable": "validator.enable",
}


_OF_0_2 = {
    "[job] dump_folder": "dump_folder, at the top of the file",
    "[model] name": "[job] module",
    "[model] flavor": "[job] flavor",
    "[model] hf_assets_path": "hf_assets_path, at the top",
    "[profiling]": "[profiler]",
    "[training] dataset": "[dataloader] dataset",
    "[optimizer] lr": _LEARNING_RATE,
    "[validation]": "[validator]",
}
"""Keys of a job file of torchtitan 0.2, and their names now."""


def refuse_older_file(tables: Mapping[str, Any], source: str) -> None:
    """Check that a job file is not of torchtitan 0.2."""
    if not _in_file("[model] name", tables):
        return
    found = {old: new for old, new in _OF_0_2.items() if _in_file(old, tables)}
    raise JobError(
        f"{source} is a job file of torchtitan 0.2; its keys are now: "
        + "; ".join(f"{old} is {new}" for old, new in found.items())
    )


def _in_file(key: str, tables: Mapping[str, Any]) -> bool:
    section, _space, name = key.partition(" ")
    table = tables.get(section.strip("[]"))
    return isinstance(table, Mapping) and (not name or name in table)


def refuse(arguments: Iterable[str], config: Any) -> None:
    """Check that no flag has another name in this version."""
    for argument in arguments:
        flag = argument.partition("=")[0]
        key = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and key in RENAMED and not _has(config, key):
            raise JobError(f"there is no flag {flag}; the key is {RENAMED[key]}")


def _has(config: Any, key: str) -> bool:
    try:
        operator.attrgetter(key)(config)
    except AttributeError:
        return False
    return True

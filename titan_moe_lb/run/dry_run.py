"""Dry run: build one rank of a job without its peers (``COMM_MODE=fake_backend``)."""

from __future__ import annotations

import logging
import os

import torch
from torchtitan.models.common.param_init import skip_param_init
from torchtitan.protocols.module import Module
from torchtitan.trainer import Trainer

from titan_moe_lb.data import CORPUS, TOKENIZER_PATH
from titan_moe_lb.parallel.local_shard import local_shard

logger = logging.getLogger(__name__)


def run(config: Trainer.Config) -> int:
    """Build this rank's part of the job, log its size, and return its number of parameters.

    No step runs: torch's pipeline schedules cannot run on a fake process group, and a rank
    without its peers computes meaningless values.
    """
    stand_in_for_missing_assets(config)
    _leave_weights_unset(config)
    trainer = config.build()
    parameters = [p for part in trainer.model_parts for p in part.parameters()]
    local = [local_shard(p) for p in parameters]
    numbers = sum(p.numel() for p in local)
    size = sum(p.numel() * p.element_size() for p in local)
    logger.info(
        f"Dry run: built rank {os.environ['RANK']} of {torch.distributed.get_world_size()}, "
        f"{numbers:,} parameters ({size / 2**30:.2f} GiB). No step is run: it needs the other ranks"
    )
    trainer.close()
    torch.distributed.destroy_process_group()
    return numbers


def stand_in_for_missing_assets(config: Trainer.Config) -> None:
    """Use the embedded tokenizer and text if the tokenizer's folder is not on this machine."""
    if not os.path.isdir(config.hf_assets_path):
        config.hf_assets_path = TOKENIZER_PATH
        if hasattr(config.dataloader, "dataset"):
            config.dataloader.dataset = CORPUS


def _leave_weights_unset(config: Trainer.Config) -> None:
    """Skip weight initialization, which is slow and commits memory."""
    assert config.model_spec is not None
    modules = config.model_spec.traverse(Module.Config, recurse=True)
    for _fqn, module, _parent, _attribute in modules:
        assert isinstance(module, Module.Config)
        if module.param_init is not None:
            module.param_init = dict.fromkeys(module.param_init, skip_param_init)

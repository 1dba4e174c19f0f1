"""One rank of a job, built without the others: ``COMM_MODE=fake_backend``."""

from __future__ import annotations

import os

import torch
from torchtitan.tools.logging import init_logger, logger
from torchtitan.trainer import Trainer

from titan_moe_lb.data import CORPUS, TOKENIZER_PATH
from titan_moe_lb.local_shard import local_shard


def stand_in_for_missing_assets(config: Trainer.Config) -> None:
    """Use the embedded tokenizer and text where the job's own are not on this machine."""
    if not os.path.isdir(config.hf_assets_path):
        config.hf_assets_path = TOKENIZER_PATH
        if hasattr(config.dataloader, "dataset"):
            config.dataloader.dataset = CORPUS


def build_only(config: Trainer.Config) -> None:
    """Build this rank's part of the job and say how large it is.

    Upstream fact: torch's pipeline schedules cannot run on a fake process group, so a
    pipeline job ends here.
    """
    init_logger()
    trainer = config.build()
    parameters = [p for part in trainer.model_parts for p in part.parameters()]
    local = [local_shard(p) for p in parameters]
    numbers = sum(p.numel() for p in local)
    size = sum(p.numel() * p.element_size() for p in local)
    logger.info(
        f"Dry run: built rank {os.environ['RANK']} of {torch.distributed.get_world_size()}, "
        f"{numbers:,} parameters ({size / 2**30:.2f} GiB). No step is run: a pipeline schedule "
        "needs its peers"
    )
    trainer.close()
    torch.distributed.destroy_process_group()

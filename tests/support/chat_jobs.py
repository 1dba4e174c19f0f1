"""Training on chat data with padding, through torchtitan's own loader. Every rank."""

from __future__ import annotations

import torch
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.trainer import Trainer

from examples.chat_data import loader_config
from tests.parity.layout import parse
from tests.support.train_jobs import train_config
from titan_moe_lb.job import job_config

ROWS, LENGTH, STEPS = 4, 256, 3


def train_chats(folder: str, layout: str, model: list[str]) -> list[dict[str, float]]:
    """Train three steps; return the log."""
    arguments = ["--config=deepseek_v3_tiny", *model, "--debug.no-enable-structured-logging"]
    config: Trainer.Config = job_config.draft(arguments).build()
    config.dataloader = loader_config(folder)
    config.hf_assets_path = f"{folder}/tokenizer"
    config.training.seq_len, config.training.steps = LENGTH, STEPS
    config.debug.seed = 1
    config.dump_folder, config.checkpoint.enable = f"{folder}/run", False
    parse(layout).apply(config, global_batch_size=ROWS)
    return train_config(config)


def padding_of(folder: str) -> list[tuple[int, int]]:
    """Return (padding, tokens) of each step of one process.

    Padding is the last document of a row if it consists of ends of text.
    """
    tokenizer = HuggingFaceTokenizer.Config().build(tokenizer_path=f"{folder}/tokenizer")
    loader = loader_config(folder).build(
        dp_world_size=1, dp_rank=0, tokenizer=tokenizer, seq_len=LENGTH, local_batch_size=ROWS
    )
    found = []
    for (inputs, _labels), _step in zip(loader, range(STEPS), strict=False):
        padding = 0
        for tokens, positions in zip(inputs["input"], inputs["positions"], strict=True):
            begin = int(torch.nonzero(positions == 0)[-1])
            if (tokens[begin:] == tokenizer.eos_id).all():
                padding += LENGTH - begin
        found.append((padding, ROWS * LENGTH))
    return found

"""Train on chat data with padding, through torchtitan's own loader. Every rank."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.hf_datasets.text_datasets import ChatDataLoader
from torchtitan.trainer import Trainer

from tests.parity.layout import parse
from tests.train_jobs import train_config
from titan_moe_lb.data import TOKENIZER_PATH, documents
from titan_moe_lb.job import job_config

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ROWS, LENGTH, STEPS = 4, 256, 3


def write_chats(folder: Path) -> None:
    """A tokenizer with a chat template, and questions about the topics of Python's help."""
    shutil.copytree(TOKENIZER_PATH, folder / "tokenizer")
    (folder / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE)
    with open(folder / "chats.jsonl", "w") as file:
        for number, text in enumerate(documents()):
            answer = text[: 80 + 37 * (number % 11)]
            file.write(json.dumps({"question": f"Topic {number}?", "answer": answer}) + "\n")


def messages(sample: dict) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": sample["question"]},
        {"role": "assistant", "content": sample["answer"]},
    ]


def loader_config(folder: str) -> ChatDataLoader.Config:
    return ChatDataLoader.Config(
        dataset_path="json",
        load_dataset_kwargs={"data_files": f"{folder}/chats.jsonl", "split": "train"},
        sample_processor=messages,
    )


def train_chats(folder: str, layout: str, model: list[str]) -> list[dict[str, float]]:
    """What was logged in three steps."""
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
    """(padding, tokens) of each step of one process: a row's last document, where it is nothing
    but ends of text."""
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

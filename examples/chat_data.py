"""Small chat data set that needs no download: questions about the topics of Python's help."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from torchtitan.hf_datasets.text_datasets import ChatDataLoader

from titan_moe_lb.data import TOKENIZER_PATH, documents

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_chats(folder: Path) -> None:
    """Write ``chats.jsonl``, and a tokenizer with a chat template in ``tokenizer``."""
    shutil.copytree(TOKENIZER_PATH, folder / "tokenizer", dirs_exist_ok=True)
    (folder / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE)
    with open(folder / "chats.jsonl", "w") as file:
        for number, text in enumerate(documents()):
            answer = text[: 80 + 37 * (number % 11)]
            file.write(json.dumps({"question": f"Topic {number}?", "answer": answer}) + "\n")


def messages(sample: dict) -> list[dict[str, str]]:
    """Convert a line of the file to a conversation."""
    return [
        {"role": "user", "content": sample["question"]},
        {"role": "assistant", "content": sample["answer"]},
    ]


def loader_config(folder: Path | str) -> ChatDataLoader.Config:
    """Configure torchtitan's chat loader, which packs conversations and pads the end of a row."""
    return ChatDataLoader.Config(
        dataset_path="json",
        load_dataset_kwargs={"data_files": f"{folder}/chats.jsonl", "split": "train"},
        sample_processor=messages,
    )

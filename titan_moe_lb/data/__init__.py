"""A small corpus of real English text that every machine already has.

Python's own language reference and library topics (``pydoc_data.topics``,
465,000 characters) behind torchtitan's dataset registry under the name ``CORPUS``,
and a 2,048-entry BPE tokenizer trained on it (``tokenizer/``, made by
``train_tokenizer.py``).
"""

from __future__ import annotations

import importlib.resources
import pydoc_data.topics
from collections.abc import Callable

from datasets import Dataset
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS

CORPUS = "python_docs"
"""Name of the dataset in ``[dataloader] dataset``."""

TOKENIZER_PATH = str(importlib.resources.files("titan_moe_lb.data") / "tokenizer")
"""Folder of the tokenizer, for ``hf_assets_path``."""


def documents() -> list[str]:
    """The topics in alphabetical order, one text each."""
    topics = pydoc_data.topics.topics
    return [topics[name] for name in sorted(topics)]


def register(name: str, texts: Callable[[], list[str]]) -> None:
    """Enter texts that are a part of Python, so that the path of the dataset names nothing."""
    DATASETS[name] = DatasetConfig(
        path=name,
        loader=lambda path: Dataset.from_dict({"text": texts()}),
        sample_processor=lambda sample: sample["text"],
    )


register(CORPUS, documents)

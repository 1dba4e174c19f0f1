"""Data sets, data loaders and tokenizers of torchtitan, and their properties that the package uses.

Besides this module, only :mod:`titan_moe_lb.upstream.finite_data` names a loader of torchtitan.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from datasets import Dataset
from torchtitan.components.dataloader import BaseDataLoader, ParallelAwareDataloader
from torchtitan.components.tokenizer import BaseTokenizer, HuggingFaceTokenizer
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import (
    DATASETS,
    ChatDataLoader,
    HuggingFaceTextDataLoader,
    InterleavedChatDataLoader,
)


def register(name: str, texts: Callable[[], list[str]]) -> None:
    """Register texts as a data set of torchtitan, with its name as path."""
    DATASETS[name] = DatasetConfig(
        path=name,
        loader=lambda path: Dataset.from_dict({"text": texts()}),
        sample_processor=lambda sample: sample["text"],
    )


def data_sets() -> Collection[str]:
    """Return the names of the data sets for text loaders."""
    return DATASETS.keys()


def text(dataset: str, **options: Any) -> BaseDataLoader.Config:
    """Return the config of a loader for a text data set."""
    return HuggingFaceTextDataLoader.Config(dataset=dataset, **options)


def is_text(config: BaseDataLoader.Config) -> bool:
    """Return True if a loader reads a data set of :func:`data_sets`."""
    return isinstance(config, HuggingFaceTextDataLoader.Config)


def saves_place_by_rank(loader: type) -> bool:
    """Return True if checkpoints contain the position of each data-parallel rank in the data."""
    return issubclass(loader, ParallelAwareDataloader)


def pads_rows(loader: type) -> bool:
    """Return True if a loader pads rows and marks the padding only in the labels."""
    return issubclass(loader, (ChatDataLoader, InterleavedChatDataLoader))


def reads_tokenizer_files(tokenizer: BaseTokenizer.Config) -> bool:
    """Return True if a tokenizer reads the files of ``hf_assets_path``."""
    return isinstance(tokenizer, HuggingFaceTokenizer.Config)

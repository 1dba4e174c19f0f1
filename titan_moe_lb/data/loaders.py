"""torchtitan's data sets and data loaders, by what the package asks of them.

Only :mod:`titan_moe_lb.upstream.finite_data` names a loader of torchtitan besides.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from datasets import Dataset
from torchtitan.components.dataloader import BaseDataLoader, ParallelAwareDataloader
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import (
    DATASETS,
    ChatDataLoader,
    HuggingFaceTextDataLoader,
    InterleavedChatDataLoader,
)


def register(name: str, texts: Callable[[], list[str]]) -> None:
    """Register texts as a data set of torchtitan. Its path is its name."""
    DATASETS[name] = DatasetConfig(
        path=name,
        loader=lambda path: Dataset.from_dict({"text": texts()}),
        sample_processor=lambda sample: sample["text"],
    )


def data_sets() -> Collection[str]:
    """Names of the data sets that a text loader knows."""
    return DATASETS.keys()


def text(dataset: str, **options: Any) -> BaseDataLoader.Config:
    """Config of the loader of a text data set."""
    return HuggingFaceTextDataLoader.Config(dataset=dataset, **options)


def is_text(config: BaseDataLoader.Config) -> bool:
    """Whether a loader reads a data set of :func:`data_sets`."""
    return isinstance(config, HuggingFaceTextDataLoader.Config)


def saves_place_by_rank(loader: type) -> bool:
    """Whether a checkpoint has the place of each data-parallel rank in the data."""
    return issubclass(loader, ParallelAwareDataloader)


def pads_rows(loader: type) -> bool:
    """Whether a loader fills rows up, and marks padding in the labels alone."""
    return issubclass(loader, (ChatDataLoader, InterleavedChatDataLoader))

"""Small corpus of English text that comes with Python, and a tokenizer trained on it.

The corpus is Python's language reference and library topics (``pydoc_data.topics``, 465,000
characters), registered as dataset ``CORPUS``. ``python -m benchmarks.train_tokenizer`` made the BPE
tokenizer of 2,048 entries in ``tokenizer/``.
"""

from __future__ import annotations

import importlib.resources
import pydoc_data.topics

from titan_moe_lb.data.loaders import register

CORPUS = "python_docs"
"""Name of the dataset in ``[dataloader] dataset``."""

TOKENIZER_PATH = str(importlib.resources.files("titan_moe_lb.data") / "tokenizer")
"""Folder of the tokenizer, for ``hf_assets_path``."""


def documents() -> list[str]:
    """Return the topics in alphabetical order, one text each."""
    topics = pydoc_data.topics.topics
    return [topics[name] for name in sorted(topics)]


register(CORPUS, documents)

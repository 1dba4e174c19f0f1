"""Data loaders of torchtitan with a token mask and document numbers in their batches."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.config.override import derive

from titan_moe_lb.balancing.valid_tokens.batch_tokens import before_padding, document_numbers
from titan_moe_lb.balancing.valid_tokens.model_input import DOCUMENT_IDS, VALID_TOKENS
from titan_moe_lb.data.loaders import pads_rows
from titan_moe_lb.errors import JobError


def with_token_mask(config: Any, *, documents: bool) -> Any:
    """Derive a loader's Config whose batches contain a token mask and document numbers.

    The mask is only for loaders that pad rows. The same Config is returned if neither is needed.
    """
    loader = config._owner
    if getattr(loader, "adds_token_mask", False) or not (pads_rows(loader) or documents):
        return config
    return derive(config, _with_mask(loader).Config, documents=documents)


@functools.cache
def _with_mask(loader: type[Any]) -> type[Any]:
    class MaskingLoader(loader):
        adds_token_mask: ClassVar[bool] = True
        gives_valid_tokens: ClassVar[bool] = pads_rows(loader) or getattr(
            loader, "gives_valid_tokens", False
        )

        @dataclass(kw_only=True, slots=True)
        class Config(loader.Config):  # type: ignore[name-defined]
            documents: bool = False
            """Number the documents of each row. Filled by ``update_from_config``."""

        def __init__(self, config: Config, **kwargs: Any) -> None:
            self._numbers_documents = config.documents
            super().__init__(config, **kwargs)

        def __iter__(self) -> Iterator[tuple[dict[str, Any], Any]]:
            for inputs, labels in super().__iter__():
                if pads_rows(loader):
                    inputs[VALID_TOKENS] = before_padding(labels, IGNORE_INDEX)
                if self._numbers_documents and DOCUMENT_IDS not in inputs:
                    if "positions" not in inputs:
                        raise JobError(
                            'an aux loss has over = "document", and the batches of '
                            f"{loader.__name__} have no positions, from which the starts of "
                            'documents are found: set over = "row"'
                        )
                    inputs[DOCUMENT_IDS] = document_numbers(inputs["positions"])
                yield inputs, labels

    MaskingLoader.__qualname__ = loader.__qualname__
    return MaskingLoader

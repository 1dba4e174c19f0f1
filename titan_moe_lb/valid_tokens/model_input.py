"""A model part hands its batch's tokens on to its routers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from titan_moe_lb.errors import JobError
from titan_moe_lb.parallel.local_shard import local_shard
from titan_moe_lb.valid_tokens.batch_tokens import batch_tokens

VALID_TOKENS = "valid_tokens"
"""Argument of a model's forward and key of a data loader's batch: bool, whole rows."""

DOCUMENT_IDS = "document_ids"
"""The same, int64: number of each token's document in its row, from 0."""


def hand_on_tokens(
    part: nn.Module,
    routers: Iterable[Any],
    *,
    global_batch_size: int,
    slices: Sequence[tuple[int, int]],
) -> None:
    """Before every forward of the part, tell its routers which tokens are valid.

    torchtitan forwards what a data loader adds to ``input`` to every stage of a pipeline as
    arguments of the model, whole rows on every rank. The hook takes ours out again; in a loop
    of one's own, ``model(tokens, valid_tokens=mask)``. Without a mask all tokens are valid.

    Args:
        routers: of the part, :class:`titan_moe_lb.router.LoadBalancedRouter`.
        global_batch_size: rows of an optimizer step.
        slices: (start, length) of the parts of a row that a router of this rank sees.
    """
    routers = list(routers)
    needed = any(router.needs_tokens for router in routers)
    num_documents = max(router.aux_losses.num_documents for router in routers)
    row_length = max(start + length for start, length in slices)

    def hook(part: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        valid, documents = kwargs.pop(VALID_TOKENS, None), kwargs.pop(DOCUMENT_IDS, None)
        if not part.training:
            return args, kwargs
        if valid is not None and not any(router.config.padded for router in routers):
            raise JobError(
                "the batch says which tokens are valid, and the routers were built for batches "
                "without padding: the class of the data loader needs gives_valid_tokens = True"
            )
        if not needed:
            return args, kwargs
        rows = local_shard(args[0] if args else next(iter(kwargs.values())))
        shape = (rows.shape[0], row_length)
        valid = _checked(VALID_TOKENS, valid, torch.bool, shape)
        if valid is None:
            valid = torch.ones(shape, dtype=torch.bool, device=rows.device)
        documents = _checked(DOCUMENT_IDS, documents, torch.int64, shape)
        if num_documents > 1 and documents is None:
            raise JobError(
                'an aux loss has over = "document", and the batch does not say which tokens are '
                "of one document: its data loader gives no positions (a loop of one's own passes "
                "document_ids)"
            )
        with torch.no_grad():
            tokens = batch_tokens(
                valid,
                documents if num_documents > 1 else None,
                global_batch_size=global_batch_size,
                max_documents=num_documents,
                slices=slices,
            )
        for router in routers:
            router.tokens = tokens
        return args, kwargs

    part.register_forward_pre_hook(hook, with_kwargs=True)


def _checked(
    name: str, tensor: torch.Tensor | None, dtype: torch.dtype, shape: tuple[int, int]
) -> torch.Tensor | None:
    if tensor is None:
        return None
    tensor = local_shard(tensor)
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise JobError(
            f"{name} is {str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}; "
            f"this batch needs {str(dtype).removeprefix('torch.')} of shape {shape}, whole rows "
            "also where a rank holds a part of each"
        )
    return tensor

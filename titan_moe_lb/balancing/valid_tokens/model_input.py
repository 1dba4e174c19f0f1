"""Valid tokens of a batch, passed from the input of a model part to its routers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from titan_moe_lb.balancing.valid_tokens.batch_tokens import BatchTokens, batch_tokens
from titan_moe_lb.errors import JobError
from titan_moe_lb.parallel.local_shard import local_shard
from titan_moe_lb.parallel.rank_groups import RankGroups

VALID_TOKENS = "valid_tokens"
"""Argument of a model's forward and key of a data loader's batch: mask of valid tokens, bool, whole
rows."""

DOCUMENT_IDS = "document_ids"
"""Argument and key: number of each token's document in its row, from 0, int64, whole rows."""


def register_token_mask(part: nn.Module, routers: Sequence[Any], groups: RankGroups) -> None:
    """Register a hook that sets the valid tokens of a part's routers before every forward.

    torchtitan passes what a data loader adds to ``input`` to every pipeline stage, as arguments of
    the model, with whole rows on every rank. The hook removes our arguments. In a user's loop, call
    ``model(tokens, valid_tokens=mask)``. Without a mask all tokens are valid. In a copy of the part,
    which has the same hook, it sets nothing.
    """
    needed = any(router.needs_tokens for router in routers)
    # A loss that is off, as in a frozen layer, still makes the loader number the documents.
    numbered = any(
        loss.config.documents for router in routers for loss in router.aux_losses.values()
    )

    def hook(called: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        valid, documents = kwargs.pop(VALID_TOKENS, None), kwargs.pop(DOCUMENT_IDS, None)
        if called is not part:
            return args, kwargs
        learns = part.training and torch.is_grad_enabled()
        masked = learns and not (valid is None and documents is None)
        expected = needed or (valid is None and numbered)
        if masked and routers and not expected:
            raise JobError(
                "the batch has a token mask, but the loop announced batches without padding: set "
                "attach(..., padded=True), or gives_valid_tokens = True in the class of "
                "a job's data loader"
            )
        if needed:
            tokens = _read(routers, args[0], valid, documents, groups) if masked else None
            for router in routers:
                router.tokens = tokens
        return args, kwargs

    part.register_forward_pre_hook(hook, with_kwargs=True)


def _read(
    routers: Sequence[Any],
    model_input: torch.Tensor,
    valid: torch.Tensor | None,
    documents: torch.Tensor | None,
    groups: RankGroups,
) -> BatchTokens:
    given = documents if valid is None else valid
    assert given is not None
    length = given.shape[-1]
    model_input = local_shard(model_input)
    if model_input.ndim == 2:  # the tokens themselves: a first stage
        length = model_input.shape[1] * groups.context.size
    shape = (model_input.shape[0], length)
    if valid is None:
        valid = torch.ones(shape, dtype=torch.bool, device=model_input.device)
    num_documents = max(router.num_documents for router in routers)
    if documents is not None:
        documents = _checked(DOCUMENT_IDS, documents, torch.int64, shape)
    with torch.no_grad():
        return batch_tokens(
            _checked(VALID_TOKENS, valid, torch.bool, shape),
            documents if num_documents > 1 else None,
            max_documents=num_documents,
            slices=groups.token_slices(
                length, routers[0].config.loop.context_parallel_load_balancer
            ),
        )


def _checked(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, int]
) -> torch.Tensor:
    tensor = local_shard(tensor)
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise JobError(
            f"{name} is {str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}; "
            f"this batch needs {str(dtype).removeprefix('torch.')} of shape {shape}, whole rows "
            "also where a rank holds a part of each"
        )
    return tensor

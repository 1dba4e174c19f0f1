"""Valid tokens of a forward, and their sequences. Torch alone.

Shape suffixes: B = rows of a micro-batch, S = tokens of a whole row, L = tokens of a row on
this rank, D = documents of a row that are distinguished.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from titan_moe_lb.functional import inverse_sums


class Sequences(NamedTuple):
    """Sizes of the sequences of a forward.

    If all sequences are equal, as without padding, both are plain numbers and cost no operator.
    """

    tokens: int | torch.Tensor
    """Valid tokens of each whole sequence, at least 1; float32 ``(B, 1)`` or one number."""

    share: float | torch.Tensor
    """Share of the sequence in its row, by tokens: 1 if a row is one sequence, 0 without a valid
    token; float32 ``(B, 1)`` or one number."""

    def together(self, number: int) -> Sequences:
        """Merge all ``number`` sequences into one."""
        if not isinstance(self.tokens, torch.Tensor):
            return Sequences(self.tokens * number, self.share * number)
        assert isinstance(self.share, torch.Tensor)
        tokens_11 = (self.tokens * (self.share > 0)).sum(dim=0, keepdim=True)
        return Sequences(tokens_11.clamp(min=1), self.share.sum(dim=0, keepdim=True))


class BatchTokens(NamedTuple):
    """Tokens of one forward on a rank.

    All rows have the same weight, and so have the valid tokens of a row.
    """

    valid_BL: torch.Tensor
    """1 for a valid token, 0 for padding, int64 ``(B, L)``."""

    rows: Sequences
    """Each row as one sequence."""

    document_BL: torch.Tensor | None = None
    """Number of each token's document in its row, int64 ``(B, L)``; None if rows are sequences."""

    documents: Sequences | None = None
    """The documents of all rows, ``(B D, 1)``."""

    def saved(self, save: Callable[[torch.Tensor], torch.Tensor]) -> BatchTokens:
        """Copy every tensor by an operator that a checkpointing policy saves."""

        def saved(sequences: Sequences) -> Sequences:
            return Sequences(save(sequences.tokens), save(sequences.share))  # type: ignore[arg-type]

        return BatchTokens(
            save(self.valid_BL),
            saved(self.rows),
            None if self.document_BL is None else save(self.document_BL),
            None if self.documents is None else saved(self.documents),
        )

    @property
    def token_share_BL(self) -> torch.Tensor:
        """Each token's share of its row, float32 ``(B, L)``."""
        return self.valid_BL * (self.rows.share / self.rows.tokens)


def token_weights(
    score_func: str, scores_BLE: torch.Tensor, tokens: BatchTokens | None
) -> torch.Tensor | None:
    """Compute 1 / sum_j s(t,j) ``(B, L)``, 0 for padding; None if all are 1."""
    if score_func == "softmax":  # its sums are 1
        return None if tokens is None else tokens.valid_BL.float()
    inverse_BL = inverse_sums(scores_BLE)
    return inverse_BL if tokens is None else inverse_BL * tokens.valid_BL


def batch_tokens(
    valid_BS: torch.Tensor,
    document_BS: torch.Tensor | None,
    *,
    max_documents: int,
    slices: Sequence[tuple[int, int]],
) -> BatchTokens:
    """Compute the tokens of a rank's routers from whole rows.

    Documents are numbered from 0; later ones than D, ``max_documents``, are merged into the last.
    ``slices`` are the (start, length) of the parts of a row that this rank holds, in order.
    """
    valid_BS = valid_BS.long()
    rows = _sequences(valid_BS.sum(dim=1, keepdim=True), 1.0)
    document_BL, documents = None, None
    if document_BS is not None:
        document_BS = document_BS.clamp(max=max_documents - 1)
        lengths_BD = valid_BS.new_zeros(valid_BS.shape[0], max_documents)
        lengths_BD.scatter_add_(1, document_BS, valid_BS)
        share_BD = lengths_BD * (rows.share / rows.tokens)
        documents = _sequences(lengths_BD.reshape(-1, 1), share_BD.reshape(-1, 1))
        document_BL = _held(document_BS, slices)
    return BatchTokens(_held(valid_BS, slices), rows, document_BL, documents)


def _sequences(lengths_B1: torch.Tensor, share: float | torch.Tensor) -> Sequences:
    return Sequences(tokens=lengths_B1.clamp(min=1).float(), share=(lengths_B1 > 0) * share)


def _held(whole_BS: torch.Tensor, slices: Sequence[tuple[int, int]]) -> torch.Tensor:
    return torch.cat([whole_BS.narrow(1, start, length) for start, length in slices], dim=1)


def document_numbers(positions_BS: torch.Tensor) -> torch.Tensor:
    """Compute the number of each token's document in its row, from 0.

    Args:
        positions_BS: position of each token in its document, int64 ``(B, S)``. A document
            begins where the position does not increase by one.
    """
    begins_BS = positions_BS.diff(dim=1) != 1
    return torch.nn.functional.pad(begins_BS.long(), (1, 0)).cumsum(dim=1)


def before_padding(labels_BS: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Find the tokens before the ignored labels at the end of a row, bool ``(B, S)``.

    torchtitan's chat data set pads rows with ignored labels. Earlier ignored labels belong to
    prompts, which are no padding: every example ends in a label that counts.
    """
    counts_BS = (labels_BS != ignore_index).flip(1).long().cumsum(dim=1).flip(1)
    return counts_BS > 0

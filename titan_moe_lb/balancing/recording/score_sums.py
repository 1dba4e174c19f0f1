"""Sums of a router's scores over the tokens of a step: how sure its choice is.

The tokens of a forward become the rows of one table, whose columns are listed in :class:`Column`.
One matrix product with the first of these columns adds all sums to the record: sums of the columns,
of their squares, and of the probabilities of each expert.

Shape suffixes: N = routers of the rank, T = local tokens of a forward, E = experts, K = top_k, W = weights, F = columns of
:class:`Column`, C = F + E columns, H = edges of the margin.
"""

from __future__ import annotations

import math
from enum import IntEnum, auto
from typing import NamedTuple

import torch
from torch import nn

from titan_moe_lb.balancing.recording.recomputation import is_recomputation
from titan_moe_lb.balancing.score_functions import SLOPES
from titan_moe_lb.balancing.valid_tokens.batch_tokens import BatchTokens, token_weights

MARGIN_EDGES = tuple(2.0**-exponent for exponent in (11, 9, 7, 5, 3, 1))
"""Edges of the histogram of the relative margin."""


class Column(IntEnum):
    """Columns of a token; the first five are also weights of the sums."""

    TOKEN = 0
    """1; 0 for padding."""
    INVERSE_SUM = auto()
    """1 / sum_j s(t,j); 1 for a softmax."""
    LOGIT_NORM = auto()
    """Euclidean norm of the logits."""
    INPUT_NORM = auto()
    """Euclidean norm of the input of the gate."""
    NEXT_LOGIT = auto()
    """Logit of the first expert that is not chosen."""
    ENTROPY = auto()
    """- sum_j s(t,j) log s(t,j), not normalized."""
    LOG_INVERSE_SUM = auto()
    CHOSEN = auto()
    """Sum of the scores of the chosen experts."""
    ROUNDED = auto()
    """Operands of the gate, its input and its weight, that a bfloat16 gate would round: 0 to 2."""
    MARGIN = auto()
    """Selection score of the last chosen expert less that of the next one."""
    EXCEEDS = auto()
    """1 if the relative margin, of the experts and of the groups, exceeds the first of :data:`MARGIN_EDGES`; one column for each."""


NUM_WEIGHTS = Column.NEXT_LOGIT + 1
NUM_COLUMNS = Column.EXCEEDS + len(MARGIN_EDGES)


class Choice(NamedTuple):
    """Experts of every token, and the decision between the last chosen and the next expert."""

    expert_ids_BLK: torch.Tensor
    """Experts of every token, int64."""

    ids_BLK: torch.Tensor
    """Experts that the router chose itself, before a replay; ``(B, L, K + 1)`` with the next one
    where ``best_BLK1`` is known, in the order of their selection scores."""

    best_BLK1: torch.Tensor | None = None
    """K + 1 best selection scores, in descending order; None if the scores did not decide, if no
    expert was left, or if nobody observes the decision."""

    group_margin_BL1: torch.Tensor | None = None
    """Margin of the last open expert group over the next; None without a group limit."""


class ScoreSums(nn.Module):
    """Sums of one router in the running step, and constants of its operators.

    Attributes:
        sums_WC: sums of the products of weight and column, float32.
        largest_logit: largest absolute logit of a valid token, float32 ``(1,)``.
        edges_H: edges of the margin over the norm of the logits, float32.
        numbers: 0, 1 and 2, float32 ``(3,)``.
    """

    sums_WC: torch.Tensor
    largest_logit: torch.Tensor
    edges_H: torch.Tensor
    numbers: torch.Tensor

    def __init__(self, sums_WC: torch.Tensor, largest_logit: torch.Tensor) -> None:
        super().__init__()
        edges = torch.tensor(MARGIN_EDGES) / math.sqrt(sums_WC.shape[1] - NUM_COLUMNS)
        for name, tensor in {
            "sums_WC": sums_WC,
            "largest_logit": largest_logit,
            "edges_H": edges.to(sums_WC.device),
            "numbers": torch.arange(3.0, device=sums_WC.device),
        }.items():
            self.register_buffer(name, tensor, persistent=False)

    def add(
        self,
        score_func: str,
        weight_dtype: torch.dtype,
        x_BLD: torch.Tensor,
        logits_BLE: torch.Tensor,
        scores_BLE: torch.Tensor,
        inverse_BL: torch.Tensor | None,
        chosen: Choice,
        tokens: BatchTokens | None,
    ) -> None:
        """Add the tokens of one forward, once; a recomputed forward adds nothing.

        ``inverse_BL`` is 1 / sum_j s(t,j), 0 for padding; None if nobody needed it.
        """
        if is_recomputation() or not scores_BLE.numel():
            return
        x_TD, logits_TE, scores_TE = (t.flatten(0, 1) for t in (x_BLD, logits_BLE, scores_BLE))
        zero_T1, one_T1, _two = self.numbers.expand(len(scores_TE), 3).split(1, dim=-1)
        valid_T1 = one_T1 if tokens is None else tokens.valid_BL.reshape(-1, 1).to(one_T1.dtype)
        if inverse_BL is None:
            inverse_BL = token_weights(score_func, scores_BLE, tokens)
        inverse_T1, log_T1 = valid_T1, zero_T1
        if inverse_BL is not None and score_func != "softmax":
            inverse_T1 = inverse_BL.reshape(-1, 1)
            log_T1 = torch.special.xlogy(valid_T1, inverse_T1)
        norm_T1 = _norms(logits_TE)
        next_logit_T1, of_margin = zero_T1, [zero_T1.expand(-1, NUM_COLUMNS - Column.MARGIN)]
        if chosen.best_BLK1 is None:
            chosen_TK = scores_TE.gather(-1, chosen.ids_BLK.flatten(0, 1))
        else:
            ids_TK1, best_TK1 = chosen.ids_BLK.flatten(0, 1), chosen.best_BLK1.flatten(0, 1)
            scores_TK1 = scores_TE.gather(-1, ids_TK1)
            chosen_TK, next_T1 = scores_TK1[:, :-1], scores_TK1[:, -1:]
            next_logit_T1 = logits_TE.gather(-1, ids_TK1[:, -1:])
            margin_T1 = best_TK1[:, -2:-1] - best_TK1[:, -1:]
            unit_T1 = SLOPES[score_func](next_T1, next_logit_T1) * norm_T1
            closest_T1 = margin_T1
            if chosen.group_margin_BL1 is not None:
                closest_T1 = torch.minimum(margin_T1, chosen.group_margin_BL1.flatten(0, 1))
            of_margin = [margin_T1, closest_T1 > unit_T1 * self.edges_H]
        is_wide = [dtype != torch.bfloat16 for dtype in (x_BLD.dtype, weight_dtype)]
        columns = [
            valid_T1,
            inverse_T1,
            norm_T1,
            _norms(x_TD),
            next_logit_T1,
            torch.special.entr(scores_TE).sum(dim=-1, keepdim=True),
            log_T1,
            chosen_TK.sum(dim=-1, keepdim=True),
            self.numbers[sum(is_wide)].expand_as(zero_T1),
            *of_margin,
        ]
        table_TC = torch.cat([*columns, scores_TE], dim=-1).to(self.sums_WC.dtype)
        weights_TW = table_TC[:, :NUM_WEIGHTS]
        if tokens is not None:
            weights_TW, logits_TE = weights_TW * valid_T1, logits_TE * valid_T1
        self.sums_WC.addmm_(weights_TW.T, table_TC)
        largest = torch.linalg.vector_norm(logits_TE, math.inf)
        self.largest_logit.clamp_(min=largest.to(self.largest_logit.dtype))


def _norms(rows_TN: torch.Tensor) -> torch.Tensor:
    """Compute the Euclidean norm of each row ``(T, 1)``, float32 or wider."""
    wide = torch.promote_types(rows_TN.dtype, torch.float32)
    return torch.linalg.vector_norm(rows_TN, dim=-1, keepdim=True, dtype=wide)


class ScoreTotals(NamedTuple):
    """Sums of a finished step over its micro-batches and over the ranks that route its tokens."""

    columns_NWF: torch.Tensor
    """Sums of the products of weight and column, float64."""

    probabilities_NE: torch.Tensor
    """Sums of the probabilities of each expert, float64; 0 for an absent expert."""


class StepScores:
    """Sums of all routers of a rank in the running step, and in the last finished one.

    Attributes:
        largest_logit_N1: largest absolute logit on this rank in the last finished step, float32.
    """

    def __init__(self, num_routers: int, num_experts: int, device: torch.device) -> None:
        # Rows are multiples of 16 bytes, as in StepRecord.
        shape = (num_routers, NUM_WEIGHTS, NUM_COLUMNS + -(-num_experts // 4) * 4)
        self._num_columns = NUM_COLUMNS + num_experts
        self._running_NWC = torch.zeros(shape, device=device)
        self._running_largest_N1 = torch.zeros(num_routers, 4, device=device)[:, :1]
        self._step_NWC = torch.zeros_like(self._running_NWC)
        self.largest_logit_N1 = torch.zeros_like(self._running_largest_N1)

    def router(self, index: int, num_experts: int) -> ScoreSums:
        """Create the sums of one router."""
        sums_WC = self._running_NWC[index, :, : NUM_COLUMNS + num_experts]
        return ScoreSums(sums_WC, self._running_largest_N1[index])

    def finish_step(self) -> None:
        """Save the running step as the finished one."""
        self._step_NWC.copy_(self._running_NWC)
        self.largest_logit_N1.copy_(self._running_largest_N1)

    @property
    def running(self) -> list[torch.Tensor]:
        """Tables that begin a step with zeros."""
        return [self._running_NWC, self._running_largest_N1]

    @property
    def parts(self) -> ScoreTotals:
        """Sums of the finished step on this rank, float32."""
        return ScoreTotals(
            self._step_NWC[:, :, :NUM_COLUMNS],
            self._step_NWC[:, Column.INVERSE_SUM, NUM_COLUMNS : self._num_columns],
        )

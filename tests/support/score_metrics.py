"""Metrics of scores in plain numpy and float64, from recorded inputs, logits and experts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

EDGES = {f"margin_below_1_{n}": 1 / n for n in (2048, 512, 128, 32, 8, 2)}


@dataclass
class Recorded:
    """Valid tokens of one layer in a step."""

    x_TD: np.ndarray
    logits_TE: np.ndarray
    ids_TK: np.ndarray
    """Experts that the tokens were dispatched to."""
    bias_E: np.ndarray | None = None


def joined(parts: list[Recorded]) -> Recorded:
    """Concatenate the tokens of several forwards or ranks."""
    return Recorded(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("x_TD", "logits_TE")
        ),
        np.concatenate([part.ids_TK for part in parts]),
        parts[0].bias_E,
    )


def scores_and_slopes(logits_TE: np.ndarray, score_func: str) -> tuple[np.ndarray, np.ndarray]:
    """Compute scores, and the change of each with its logit."""
    if score_func == "softmax":
        powers_TE = np.exp(logits_TE - logits_TE.max(axis=1, keepdims=True))
        scores_TE = powers_TE / powers_TE.sum(axis=1, keepdims=True)
        return scores_TE, scores_TE
    sigmoid_TE = 1 / (1 + np.exp(-logits_TE))
    if score_func == "sigmoid":
        return sigmoid_TE, sigmoid_TE * (1 - sigmoid_TE)
    scores_TE = np.sqrt(np.log1p(np.exp(logits_TE)))
    return scores_TE, sigmoid_TE / (2 * scores_TE)


def selection_scores(
    scores_TE: np.ndarray, bias_E: np.ndarray | None, groups: tuple[int, int] | None
) -> np.ndarray:
    """Add the bias; an expert outside the best groups gets minus infinity."""
    selection_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if groups is None:
        return selection_TE
    number, limited = groups
    grouped_TGN = selection_TE.reshape(len(selection_TE), number, -1)
    group_TG = np.sort(grouped_TGN, axis=-1)[..., -2:].sum(axis=-1)
    order_TG = np.argsort(-group_TG, axis=-1)[:, :limited]
    is_open_TG = np.zeros_like(group_TG, dtype=bool)
    np.put_along_axis(is_open_TG, order_TG, True, axis=-1)
    return np.where(is_open_TG[..., None], grouped_TGN, -np.inf).reshape(selection_TE.shape)


def group_margins(
    selection_TE: np.ndarray, last_T: np.ndarray, groups: tuple[int, int] | None
) -> np.ndarray | float:
    """Compute the margin of the last open group over the next; infinity without a limit.

    The last chosen expert has the score ``last_T``.
    """
    if groups is None:
        return np.inf
    number, limited = groups
    best_TGN = np.sort(selection_TE.reshape(len(selection_TE), number, -1), axis=-1)
    group_TG = best_TGN[..., -2:].sum(axis=-1)
    order_TG = np.argsort(-group_TG, axis=-1)[:, limited - 1 : limited + 1]
    two_T2 = np.take_along_axis(group_TG, order_TG, axis=-1)
    best_T2 = np.take_along_axis(best_TGN[..., -1], order_TG, axis=-1)
    return np.maximum((two_T2[:, 0] - two_T2[:, 1]) / np.sqrt(2), last_T - best_T2.max(axis=-1))


def expected(
    seen: Recorded,
    score_func: str,
    *,
    groups: tuple[int, int] | None = None,
    has_margin: bool = True,
) -> dict[str, float]:
    """Compute all metrics but the flips."""
    x_TD, logits_TE = seen.x_TD.astype(np.float64), seen.logits_TE.astype(np.float64)
    scores_TE, slopes_TE = scores_and_slopes(logits_TE, score_func)
    probabilities_TE = scores_TE / scores_TE.sum(axis=1, keepdims=True)
    num_experts, top_k = logits_TE.shape[1], seen.ids_TK.shape[1]
    load_E = np.bincount(seen.ids_TK.ravel(), minlength=num_experts)
    metrics = {
        "chosen_mass": np.take_along_axis(probabilities_TE, seen.ids_TK, 1).sum(1).mean(),
        "token_entropy": -(probabilities_TE * np.log(probabilities_TE)).sum(1).mean()
        / np.log(num_experts),
        "gate_load_correlation": _correlation(probabilities_TE.sum(0), load_E),
        "logit_rms": np.sqrt((logits_TE**2).mean()),
        "largest_logit": np.abs(logits_TE).max(),
        "gate_input_rms": np.sqrt((x_TD**2).mean()),
    }
    if not has_margin:
        return metrics | dict.fromkeys(["selection_margin", "bfloat16_flip_share", *EDGES], np.nan)
    selection_TE = selection_scores(scores_TE, seen.bias_E, groups)
    order_TE = np.argsort(-selection_TE, axis=1)
    last_T, next_T = order_TE[:, top_k - 1], order_TE[:, top_k]
    tokens_T = np.arange(len(logits_TE))
    margin_T = selection_TE[tokens_T, last_T] - selection_TE[tokens_T, next_T]
    biased_TE = scores_TE if seen.bias_E is None else scores_TE + seen.bias_E
    closest_T = np.minimum(
        margin_T, group_margins(biased_TE, selection_TE[tokens_T, last_T], groups)
    )
    unit_T = slopes_TE[tokens_T, next_T] * np.sqrt((logits_TE**2).mean(axis=1))
    metrics["selection_margin"] = margin_T.mean()
    return metrics | {name: (closest_T <= edge * unit_T).mean() for name, edge in EDGES.items()}


def _correlation(mass_E: np.ndarray, load_E: np.ndarray) -> float:
    return np.nan if np.ptp(load_E) == 0 else np.corrcoef(mass_E, load_E)[0, 1]

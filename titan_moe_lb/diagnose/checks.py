"""What can be wrong with the balance of a run: one function a fault, each with its bound.

Each looks at the last quarter of the logged steps, at least five, and returns a finding or None.

Shape suffixes: S = steps of that window, M = MoE layers, E = experts, R = expert-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from titan_moe_lb.diagnose.finding import Finding, Severity
from titan_moe_lb.diagnose.window import FEWEST_STEPS, Window
from titan_moe_lb.traces import placement
from titan_moe_lb.traces.balance_statistics import max_violation
from titan_moe_lb.traces.trace import Trace

QUANTILE_BIAS = 'expert_bias = {type = "quantile"}'


def loss_is_not_finite(window: Window) -> Finding | None:
    loss_S = window.trace.step_figures.get("loss")
    if loss_S is None:
        return None
    bad_S = ~np.isfinite(loss_S)
    if not bad_S[-1] or bad_S.all():  # a trace may never have known it
        return None
    first = int(window.trace.steps[np.flatnonzero(~bad_S)[-1] + 1])
    return Finding(
        kind="diverged",
        severity=Severity.FAULT,
        what=f"the language-model loss is not a number from step {first} on",
        evidence=f"the last finite loss is {loss_S[~bad_S][-1]:.4g}",
        reason="nothing that is learned after it counts",
        remedy="go on from a checkpoint before it with a lower learning rate",
    )


def routing_is_forced(window: Window) -> Finding | None:
    if not window.is_forced:
        return None
    return Finding(
        kind="forced_routing",
        severity=Severity.NOTE,
        what=f"{window.trace.info.forced_routing} decided where tokens went",
        evidence="the trace says so",
        reason="a benchmark shows what an imbalance costs, not how a router behaves",
        remedy="take forced_routing out of the job to train",
    )


def dead_experts(window: Window) -> Finding | None:
    dead_ME = (window.counts_SME == 0).all(axis=0)
    expected = window.tokens_per_step * window.trace.info.top_k / window.trace.info.num_experts
    seen = expected * len(window.counts_SME)
    if not dead_ME.any() or seen < 20:  # e**-20: chance would not do it
        return None
    number = int(dead_ME.sum())
    layer = int(np.flatnonzero(dead_ME.any(axis=1))[0])
    experts = np.flatnonzero(dead_ME[layer])[:6].tolist()
    return Finding(
        kind="dead_experts",
        severity=Severity.FAULT if dead_ME.mean() > 0.05 else Severity.WARNING,
        what=f"{number} expert{'s' if number > 1 else ''} got no token at all in "
        f"{window.layers(dead_ME.any(axis=1))}",
        evidence=f"layer {window.trace.layers[layer]}: experts {experts}, over the last "
        f"{len(window.counts_SME)} logged steps; balance would have been {seen:.0f} tokens each",
        reason="an expert without tokens has no gradient, and does not come back by itself",
        remedy="a bias made of the quantiles of the scores brings it back within a few steps",
        toml=QUANTILE_BIAS,
    )


def collapse(window: Window) -> Finding | None:
    num_experts = window.trace.info.num_experts
    effective_M = window.effective_experts_M
    collapsed_M = effective_M < num_experts / 2
    if not collapsed_M.any() or window.is_forced:
        return None
    return Finding(
        kind="collapse",
        severity=Severity.FAULT,
        what=f"routing collapses in {window.layers(collapsed_M)}",
        evidence=f"the load is as concentrated as on {effective_M.min():.1f} balanced experts of "
        f"{num_experts} (MaxVio {window.violation_M[collapsed_M].max():.2f})",
        reason="below half of the experts, the others hardly learn, and fall further behind",
        remedy="balance harder, from a checkpoint before the collapse",
        toml=QUANTILE_BIAS,
    )


def nothing_balances(window: Window) -> Finding | None:
    info = window.trace.info
    if info.losses or (info.expert_bias or "frozen").split()[0] != "frozen" or window.is_forced:
        return None
    return Finding(
        kind="nothing_balances",
        severity=Severity.WARNING,
        what="neither an aux loss nor a moving expert bias balances this run",
        evidence=f"MaxVio {window.violation_M.mean():.2f}, mean over layers",
        reason="left alone, routers prefer the experts that are ahead",
        remedy="add the sign bias of DeepSeek-V3, or the quantile bias",
        toml=QUANTILE_BIAS,
    )


def balance_is_too_weak(window: Window) -> Finding | None:
    """MaxVio above 1, and no better than at the middle of the run."""
    info, trace = window.trace.info, window.trace
    if not (info.losses or info.expert_bias) or window.is_forced:
        return None
    middle = slice(len(trace.steps) // 2, max(len(trace.steps) // 2 + 1, window.first))
    before = float(max_violation(trace.counts_SME[middle]).mean())
    now = float(window.violation_M.mean())
    if now <= 1 or now < 0.9 * before or len(trace.steps) < 4 * FEWEST_STEPS:
        return None
    toml = QUANTILE_BIAS
    if info.losses and not info.expert_bias:
        name, weight = next(iter(info.losses.items()))
        toml = f"weight = {10 * weight:g}   # of {name}; or: {QUANTILE_BIAS}"
    return Finding(
        kind="too_weak",
        severity=Severity.WARNING,
        what="the balance is bad and no longer gets better",
        evidence=f"MaxVio {before:.2f} in the middle of the run, {now:.2f} at its end",
        reason="above 1 the fullest expert has twice its share, and so has what waits for it",
        remedy="ten times the weight of the aux loss, or a bias that does not need one",
        toml=toml,
    )


def aux_loss_dominates(window: Window) -> Finding | None:
    """Where the job measures it: metrics.router_gradients."""
    main_SM = window.figure_SM("main_gradient_squared")
    aux_SM = window.figure_SM("aux_gradient_squared")
    if main_SM is None or aux_SM is None:
        return None
    ratio_M = np.sqrt(np.nanmean(aux_SM, axis=0) / np.maximum(np.nanmean(main_SM, axis=0), 1e-300))
    strong_M = ratio_M > 3
    if not strong_M.any():
        return None
    losses = window.trace.info.losses
    name, weight = max(losses.items(), key=lambda item: item[1], default=("aux loss", 0.0))
    return Finding(
        kind="aux_loss_dominates",
        severity=Severity.WARNING,
        what=f"the aux losses outweigh the model's own loss in the router of "
        f"{window.layers(strong_M)}",
        evidence=f"norm of their gradient in the logits over that of the model's loss: "
        f"{ratio_M[strong_M].max():.2g}",
        reason="above 3 the router learns to be even, and hardly to choose",
        remedy=f"a tenth of the weight of {name}, or a bias, which has no gradient",
        toml=f"weight = {weight / 10:g}   # of {name}; or: {QUANTILE_BIAS}",
    )


def bias_saturates(window: Window) -> Finding | None:
    range_SM = window.figure_SM("bias_range")
    if range_SM is None:
        return None
    range_M = np.nan_to_num(range_SM[-1])
    if not (range_M > 1).any():
        return None
    return Finding(
        kind="bias_saturates",
        severity=Severity.WARNING,
        what=f"the expert bias outweighs the scores in {window.layers(range_M > 1)}",
        evidence=f"largest less smallest bias: {range_M.max():.3g}",
        reason="scores lie between 0 and 1: a range above 1 chooses experts whatever the token",
        remedy="lower its speed, or start it anew",
        toml='expert_bias = {type = "sign", speed = 1e-3, reset = true}',
    )


def bias_oscillates(window: Window) -> Finding | None:
    """An expert that is above its share in one step is below it in the next."""
    trace = window.trace
    if not trace.info.expert_bias or (np.diff(trace.steps[window.first :]) != 1).any():
        return None
    deviation_SME = window.load_SME - 1
    size_M = np.abs(deviation_SME).mean(axis=(0, 2))
    product_M = (deviation_SME[1:] * deviation_SME[:-1]).sum(axis=(0, 2))
    correlation_M = product_M / np.maximum((deviation_SME**2).sum(axis=(0, 2)), 1e-12)
    swings_M = (correlation_M < -0.3) & (size_M > window.chance_violation(window.tokens_per_step))
    if not swings_M.any():
        return None
    return Finding(
        kind="bias_oscillates",
        severity=Severity.WARNING,
        what=f"the loads swing from step to step in {window.layers(swings_M)}",
        evidence=f"correlation of an expert's load with that of the step before: "
        f"{correlation_M.min():.2f}; mean deviation from balance {size_M[swings_M].max():.0%}",
        reason="below -0.3, with deviations that chance does not make, the bias overshoots",
        remedy="a tenth of its speed, or a rule without one",
        toml=QUANTILE_BIAS,
    )


def hot_rank(window: Window) -> Finding | None:
    info = window.trace.info
    if info.ep == 1 or info.num_experts % info.ep:
        return None
    mean_ME = window.counts_SME.mean(axis=0)
    as_placed = placement.contiguous(info.num_experts, info.ep)
    factor_M = np.array([placement.overload(load_E, as_placed) for load_E in mean_ME])
    best_M = factor_M.copy()
    for row in np.flatnonzero(factor_M > 1.2):
        best = placement.greedy_in_groups(mean_ME[row], info.ep, info.expert_groups or ())
        best_M[row] = placement.overload(mean_ME[row], best)
    hot_M = best_M < 1 + (factor_M - 1) / 2
    if not hot_M.any():
        return None
    worst = int(np.argmax(np.where(hot_M, factor_M, 0)))
    return Finding(
        kind="hot_rank",
        severity=Severity.WARNING,
        what=f"one expert-parallel rank is hot because of what is placed on it, in "
        f"{window.layers(hot_M)}",
        evidence=f"layer {window.trace.layers[worst]}: rank "
        f"{int(mean_ME[worst][as_placed].sum(axis=-1).argmax())} gets "
        f"{factor_M[worst]:.2f} times its share; the same experts in another order would give "
        f"{best_M[worst]:.2f}",
        reason="above 1.2 every rank waits a fifth of the time of its experts",
        remedy="titan-moe-lb plan --from-run says what moving experts buys, titan-moe-lb place "
        "moves them; a stronger balance makes it needless",
        toml=QUANTILE_BIAS,
    )


def hidden_in_micro_batches(window: Window) -> Finding | None:
    single_SM = window.figure_SM("micro_batch_max_violation")
    if single_SM is None or window.is_forced:
        return None
    info = window.trace.info
    group = info.ep if info.ep > 1 else 1
    chance = window.chance_violation(info.micro_batch_size * info.seq_len * group)
    single_M = np.nanmean(single_SM, axis=0)
    hidden_M = (single_M > 1.5 * chance + 0.5) & (window.violation_M < single_M / 3)
    if not hidden_M.any():
        return None
    return Finding(
        kind="hidden_in_micro_batches",
        severity=Severity.WARNING,
        what=f"single micro-batches are far less balanced than whole steps in "
        f"{window.layers(hidden_M)}",
        evidence=f"MaxVio {single_M[hidden_M].max():.2f} in a micro-batch, "
        f"{window.violation_M[hidden_M].mean():.2f} in a step; chance makes {chance:.2f}",
        reason="ranks wait for each micro-batch, and memory peaks in one, however even the sum is",
        remedy="a loss over each sequence spreads what a micro-batch holds",
        toml='aux_losses = [{type = "sequence_wise", weight = 1e-3}]',
    )


def first_layers_are_worse(window: Window) -> Finding | None:
    number = len(window.violation_M)
    if number < 4 or window.is_forced:
        return None
    first, others = float(window.violation_M[0]), float(np.median(window.violation_M[1:]))
    if first < 0.5 or first < 2 * others:
        return None
    return Finding(
        kind="first_layers",
        severity=Severity.NOTE,
        what=f"the first MoE layer ({window.trace.layers[0]}) is far less balanced than the others",
        evidence=f"MaxVio {first:.2f} against {others:.2f}, the median of the others",
        reason="the first layer sees little but the token itself, and frequent tokens are few; "
        "twice the others is where it decides the step's time",
        remedy="leave the first layers dense, as DeepSeek-V3 does with three, or balance harder",
        toml=QUANTILE_BIAS,
    )


def much_padding(window: Window) -> Finding | None:
    share_S = window.step_figure_S("padding_share")
    if share_S is None or np.nanmean(share_S) <= 0.3:
        return None
    return Finding(
        kind="padding",
        severity=Severity.NOTE,
        what=f"{np.nanmean(share_S):.0%} of the routed tokens are padding",
        evidence="moe/padding_share, mean over the last steps",
        reason="padding is dispatched like any token: above a third it decides load and time",
        remedy="pack rows, or make them shorter",
    )


CHECKS: tuple[Callable[[Window], Finding | None], ...] = (
    loss_is_not_finite,
    collapse,
    dead_experts,
    nothing_balances,
    balance_is_too_weak,
    aux_loss_dominates,
    bias_saturates,
    bias_oscillates,
    hot_rank,
    hidden_in_micro_batches,
    first_layers_are_worse,
    much_padding,
    routing_is_forced,
)


def findings(trace: Trace) -> list[Finding]:
    """All that is wrong at the end of a run of at least :data:`FEWEST_STEPS` logged steps, the
    worst first."""
    window = Window(trace)
    found = [finding for check in CHECKS if (finding := check(window)) is not None]
    return sorted(found, key=lambda finding: -finding.severity)

"""Checks of the scores and logits of routers. They need ``metrics.router_scores``."""

from __future__ import annotations

import numpy as np

from titan_moe_lb.commands.diagnose.balancing import Remedy
from titan_moe_lb.commands.diagnose.finding import Finding, Severity
from titan_moe_lb.commands.diagnose.window import Window, mean_over_steps

SATURATED_SIGMOID = 17.0
"""Logit whose sigmoid is 1 in float32."""
LARGE_LOGIT = 50.0
"""Absolute logit beyond which a softmax in float32 has probabilities of 0, e to the power -104."""
GROWTH = 1.1
"""Growth over the mean of the run's first half above which logits grow."""
DECIDED_NATS = 0.1
"""Entropy of a token's distribution at which its first expert has 98 % of the mass."""
MANY_FLIPS = 0.05


def logits_grow(window: Window) -> Finding | str | None:
    """Check if logits are large and still grow."""
    largest_SM = window.column("largest_logit")
    if largest_SM is None:
        return None
    trace = window.trace
    begin, end = trace.balanced_since, len(trace.steps)
    if trace.info.score_func == "sqrtsoftplus" or end - begin < 2:  # it does not saturate
        return None
    before_M = mean_over_steps(trace.layer_columns["largest_logit"][begin : (begin + end) // 2])
    now_M = mean_over_steps(largest_SM)
    bound = SATURATED_SIGMOID if trace.info.score_func == "sigmoid" else LARGE_LOGIT
    large_M = (now_M > bound) & (now_M > GROWTH * before_M)
    course = (
        f"largest logit {np.nanmax(before_M):.3g} in the first half, {np.nanmax(now_M):.3g} now"
    )
    if not large_M.any():
        return f"{course}; too large above {bound:g} if it grows"
    return Finding(
        what=f"the router logits grow without bound in {window.layers(large_M)}",
        evidence=course,
        reason=f"above {bound:g} scores are 0 or 1 in float32 where logits differ so much, and the gate "
        "no longer learns there",
        **_keep_logits_small(window),
        layers=window.numbers(large_M),
    )


def one_expert_decides(window: Window) -> Finding | str | None:
    """Check if tokens give nearly all probability mass to one of their experts."""
    entropy_SM = window.column("token_entropy")
    if entropy_SM is None:
        return None
    info = window.trace.info
    nats_M = mean_over_steps(entropy_SM) * np.log(info.num_experts_M)
    decided_M = (nats_M < DECIDED_NATS) & (info.top_k_M > 1)
    seen = f"entropy of a token's distribution {np.nanmin(nats_M):.2g} nats in the surest layer"
    if not decided_M.any():
        return f"{seen}, at least {DECIDED_NATS}"
    return Finding(
        what=f"one expert has nearly all of a token's weight in {window.layers(decided_M)}",
        evidence=seen,
        reason=f"below {DECIDED_NATS} nats the first expert has 98 % of the mass: the others are "
        "computed almost without effect",
        **_keep_logits_small(window),
        layers=window.numbers(decided_M),
    )


def bfloat16_flips(window: Window) -> Finding | str | None:
    """Check if a gate in bfloat16 would route many tokens to other experts."""
    share_SM = window.column("bfloat16_flip_share")
    if share_SM is None:
        return None
    share_M = mean_over_steps(share_SM)
    many_M = share_M > MANY_FLIPS
    seen = f"{np.nanmax(share_M):.1%} of the tokens of a layer would have other experts"
    if not many_M.any():
        return f"{seen} with a bfloat16 gate, at most {MANY_FLIPS:.0%}"
    return Finding(
        severity=Severity.NOTE,
        what=f"an engine with a bfloat16 gate would route otherwise in {window.layers(many_M)}",
        evidence=f"{seen}, estimated from their margins",
        reason=f"above {MANY_FLIPS:.0%} of the tokens, results of other engines are known to suffer",
        remedy="serve and evaluate with a gate in float32; in reinforcement learning replay the "
        "routing of the rollout",
        layers=window.numbers(many_M),
    )


def _keep_logits_small(window: Window) -> Remedy:
    weight = window.trace.info.losses.get("z_loss")
    if weight is None:
        return {
            "remedy": "add the z-loss of ST-MoE, which keeps logits small",
            "toml": 'aux_losses = [{type = "z_loss", weight = 1e-3}]',
        }
    return {
        "remedy": "ten times the weight of z_loss, or a lower learning rate of the gate",
        "toml": f"weight = {10 * weight:g}   # of z_loss",
    }

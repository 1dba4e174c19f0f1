"""Checks of the expert bias: too slow, too fast, too large."""

from __future__ import annotations

import numpy as np

from titan_moe_lb.commands.diagnose.balancing import QUANTILE, Balancing
from titan_moe_lb.commands.diagnose.finding import Finding
from titan_moe_lb.commands.diagnose.window import Window
from titan_moe_lb.traces.balance_statistics import max_violation

SHORT = 0.01
"""Share of the excess load below which a bias is too slow: it would need a hundred times the steps.

If scores are ten times closer than :meth:`Balancing.moved` assumes, it would still need ten times.
"""
LARGE = 0.1
"""Share of an expert's balanced load above which one step of the bias overshoots."""


def bias_too_slow(window: Window) -> Finding | str | None:
    """Check if the speed or the average of the bias is too slow to have balanced the loads."""
    balancing, steps = Balancing(window), window.trace.steps
    uneven_M, worst = window.lasts(window.uneven_M / 2), int(window.lasting_M.argmax())
    range_SM, ema = window.trace.layer_columns.get("bias_range"), balancing.setting("ema")
    seen = f"MaxVio of layer {window.trace.layers[worst]} is {window.lasting_M[worst]:.2g}"
    if not balancing.bias_moves:
        return None
    if balancing.setting("speed") and range_SM is not None:
        range_M = np.nan_to_num(range_SM[window.trace.balanced_since :]).max(axis=0)
        moved_M = balancing.moved(range_M)
        slow_M = uneven_M & (moved_M < SHORT * window.lasting_M)
        seen += (
            f"; the bias spans {range_M[worst]:.2g} at most up to step {steps[-1]}, against a "
            f"margin of {balancing.margin_M[worst]:.2g}, which moves {moved_M[worst]:.2g} of a load"
        )
        reason = (
            f"a bias that has moved less than {SHORT} of the excess needs a hundred times the steps"
        )
        remedy, toml = "at least a hundred times its speed, or a rule without one", QUANTILE
    elif ema is not None and ema < 1:
        lag, looked_at = ema / (1 - ema), int(steps[-1] - steps[window.first]) + 1
        slow_M = uneven_M & (lag > looked_at)
        seen += f" in the last {looked_at} steps; the bias lags {lag:.3g} steps"
        reason = "a bias that lags more steps than were uneven cannot have acted on them"
        remedy = "let the bias follow every step"
        toml = f'expert_bias = {{type = "{balancing.rule}", ema = 0.0}}'
    else:
        return None
    if not slow_M.any():
        return seen
    return Finding(
        what=f"{balancing.description} is too slow to balance {window.layers(slow_M)}",
        evidence=seen,
        reason=reason,
        remedy=remedy,
        toml=toml,
        layers=window.numbers(slow_M),
    )


def bias_oscillates(window: Window) -> Finding | str | None:
    """Check if the bias overshoots, so that other experts are overloaded in each step."""
    balancing, steps_SM = Balancing(window), window.column("bias_largest_step")
    speed = balancing.setting("speed")
    if not balancing.bias_moves or (steps_SM is None and speed is None):
        return None
    step_M = np.full(len(window.trace.layers), speed or 0.0)
    if steps_SM is not None:
        step_M = np.nanmean(steps_SM, axis=0)
    moved_M = balancing.moved(2 * step_M)  # one bias rises while another falls
    chance_M = window.by_chance(max_violation, window.tokens_per_step)
    jumps_M = (window.violation_M > 3 * chance_M) & (window.lasting_M < window.violation_M / 2)
    swings_M = jumps_M & (moved_M > LARGE)
    worst = int(np.argmax(np.where(swings_M, window.violation_M, 0)))
    seen = (
        f"a step of {step_M.max():.2g} against a margin of {balancing.margin_M[worst]:.2g} moves "
        f"{moved_M.max():.2g} of an expert's load; MaxVio of layer {window.trace.layers[worst]} is "
        f"{window.violation_M[worst]:.2f} in a step, {window.lasting_M[worst]:.2f} in the last "
        f"{len(window.counts_SME)} together; sampling noise alone gives {chance_M[worst]:.2f} in a step"
    )
    if not swings_M.any():
        return seen
    remedy, toml = "a tenth of its speed, or a rule without one", QUANTILE
    if speed is None:
        remedy = "let the bias average over ten steps"
        toml = f'expert_bias = {{type = "{balancing.rule}", ema = 0.9}}'
    return Finding(
        what=f"{balancing.description} is too fast: loads swing in {window.layers(swings_M)}",
        evidence=seen,
        reason="steps are twice as uneven as their sum and three times as uneven as chance, and a "
        f"step of the bias moves more than {LARGE} of a load: it overshoots",
        remedy=remedy,
        toml=toml,
        layers=window.numbers(swings_M),
    )


def bias_saturates(window: Window) -> Finding | str | None:
    """Check if the range of the expert bias exceeds that of the scores."""
    range_SM, balancing = window.column("bias_range"), Balancing(window)
    if range_SM is None:
        return None
    range_M = np.nan_to_num(range_SM[-1])
    large_M = range_M > 1
    seen = f"largest less smallest bias: {range_M.max():.3g}"
    if not large_M.any():
        return f"{seen}, at most 1"
    speed = balancing.setting("speed") if balancing.bias_moves else None
    slower = f"speed = {speed / 10:g}, " if speed else ""
    return Finding(
        what=f"the expert bias outweighs the scores in {window.layers(large_M)}",
        evidence=seen,
        reason="scores lie between 0 and 1: a range above 1 chooses experts whatever the token",
        remedy="reset it" + (", at a tenth of its speed" if slower else ""),
        toml=f'expert_bias = {{type = "{balancing.rule}", {slower}reset = true}}',
        layers=window.numbers(large_M),
    )

"""Checks of the gradients at the routers: an aux loss without one, too weak, or too strong.

They need ``metrics.router_gradients``, and read the steps that were measured.
"""

from __future__ import annotations

import numpy as np

from titan_moe_lb.commands.diagnose.finding import Finding, Severity
from titan_moe_lb.commands.diagnose.window import Window, mean_over_steps

STRONG = 3
WEAK = 1e-5
"""Share of the model's gradient below which a loss does nothing.

Noise of a gradient grows as the root of the number of steps, a loss as the number: at this share a
loss needs 1e10 steps to exceed the noise.
"""


def loss_without_gradient(window: Window) -> Finding | str | None:
    """Check if no gradient of the aux losses reaches a router."""
    norms = _norms(window)
    if norms is None:
        return None
    main_M, aux_M = norms
    info = window.trace.info
    silent_M = (aux_M == 0) & (info.top_k_M < info.num_experts_M)
    if not silent_M.any():
        return f"gradient of the losses at least {np.nanmin(aux_M):.2g} in the logits"
    cause = (
        "its value is computed, and its gradient is dropped: the result of attach() is discarded, "
        "or changes set its weight to 0"
    )
    if not main_M[silent_M].any():
        cause = (
            "nor does the model's: the gate or its input is detached, or computed without gradients"
        )
    names = " and ".join(info.losses)
    return Finding(
        severity=Severity.FAULT,
        what=f"no gradient of {names} reaches the router of {window.layers(silent_M)}",
        evidence=f"norm of the gradient in the logits: 0 from the losses, "
        f"{main_M[silent_M].max():.2g} from the model",
        reason="a loss without a gradient changes no weight, whatever its value",
        remedy=f"{cause}; titan-moe-lb check tells which loss in which layer",
        layers=window.numbers(silent_M),
    )


def aux_loss_too_weak(window: Window) -> Finding | str | None:
    """Check if the gradient of the aux losses vanishes beside that of the model's loss."""
    norms = _norms(window)
    if norms is None:
        return None
    ratio_M = _ratio(*norms)
    weak_M = (norms[1] > 0) & (ratio_M < WEAK)
    if not weak_M.any():
        return f"gradient of the losses {np.nanmin(ratio_M):.2g} of the model's, at least {WEAK:g}"
    name, weight = max(window.trace.info.losses.items(), key=lambda item: item[1])
    more = 0.01 / ratio_M[weak_M].max()
    return Finding(
        what=f"the aux losses are too weak to act in {window.layers(weak_M)}",
        evidence=f"norm of their gradient in the logits over that of the model's loss: "
        f"{ratio_M[weak_M].max():.2g}",
        reason=f"below {WEAK:g} the noise of the model's gradient hides them for any number of steps",
        remedy=f"a weight of {name} with which the share is about 0.01",
        toml=f"weight = {weight * more:.1g}   # of {name}",
        layers=window.numbers(weak_M),
    )


def aux_loss_dominates(window: Window) -> Finding | str | None:
    """Check if the gradient of the aux losses is far larger than the gradient of the model's loss."""
    norms = _norms(window)
    if norms is None:
        return None
    ratio_M, losses = _ratio(*norms), window.trace.info.losses
    strong_M = ratio_M > STRONG
    if not strong_M.any():
        return f"gradient of the losses {np.nanmax(ratio_M):.2g} of the model's, at most {STRONG}"
    name, weight = max(losses.items(), key=lambda item: item[1])
    return Finding(
        what=f"the aux losses outweigh the model's own loss in the router of "
        f"{window.layers(strong_M)}",
        evidence=f"norm of their gradient in the logits over that of the model's loss: "
        f"{ratio_M[strong_M].max():.2g}",
        reason=f"above {STRONG} the router learns to be even, and hardly to choose",
        remedy=f"a tenth of the weight of {name}",
        toml=f"weight = {weight / 10:g}   # of {name}",
        layers=window.numbers(strong_M),
    )


def _norms(window: Window) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the norms of the model's gradient and of the losses', ``(M,)`` each.

    They are root mean squares over the measured steps of the window, NaN in a layer whose losses
    are off. None without losses, and in a run or a window that has not measured them.
    """
    found = [window.column(f"{name}_gradient_squared") for name in ("main", "aux")]
    columns = [column for column in found if column is not None]
    info = window.trace.info
    if not info.losses or len(columns) < 2:
        return None
    off_M = np.isin(info.layers, info.frozen.get("losses", []))
    if off_M.all():
        return None
    # A step or a hash layer that was left out has no number.
    main_M, aux_M = (
        np.where(off_M, np.nan, np.sqrt(mean_over_steps(column_SM))) for column_SM in columns
    )
    return main_M, aux_M


def _ratio(main_M: np.ndarray, aux_M: np.ndarray) -> np.ndarray:
    return aux_M / np.maximum(main_M, 1e-150)

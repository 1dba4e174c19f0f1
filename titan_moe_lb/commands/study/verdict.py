"""Conclusions from a study and their limits, in one paragraph."""

from __future__ import annotations

import math

from titan_moe_lb.commands.study.results import Group, Setting

_TITLES = {
    "validation_loss": "loss on held-out text",
    "training_loss": "training loss (nothing was held out)",
}


def lowest(group: Group, number: str) -> Setting | None:
    """Return the setting with the lowest mean, of those without a failed cell."""
    settings = [setting for setting in group.settings if setting.complete]
    return min(settings, key=lambda setting: setting.spread(number).mean, default=None)


def verdict(group: Group) -> str:
    """Compare the settings of one model, without settings that have a failed cell."""
    settings = [setting for setting in group.settings if setting.complete]
    loss = group.loss
    best, even = lowest(group, loss), lowest(group, "max_violation")
    if best is None or even is None:
        return "No setting succeeded."
    seeds = min(len(setting.results) for setting in settings)
    sentences = [
        f"Lowest {_TITLES[loss]}: {_with_range(best, loss)}.",
        f"Most even load: {_with_range(even, 'max_violation', 'MaxVio ')}.",
    ]
    if seeds < 2:
        sentences.append(
            'One seed each, so chance cannot be estimated: add an axis key = "debug.seed".'
        )
    else:
        highest = best.spread(loss).high
        level = [s for s in settings if s is not best and s.spread(loss).low <= highest]
        if level:
            sentences.append(
                f"In the loss, {_listed(level)} and it do not differ clearly: the ranges of their "
                f"{seeds} seeds overlap."
            )
        else:
            sentences.append(f"Its {seeds} seeds are all below those of every other setting.")
        costs = [setting for setting in settings if setting not in (best, *level)]
        if even in costs:
            gap = even.spread(loss).mean - best.spread(loss).mean
            sentences.append(f"The most even setting has a loss higher by {gap:.3g}.")
    slowest = max(settings, key=lambda setting: setting.spread("step_slowdown").mean)
    if not math.isnan(slowest.spread("step_slowdown").mean):
        sentences.append(
            f"For the planned job the imbalance of {slowest.name} would cost "
            f"{slowest.spread('step_slowdown').mean - 1:.0%} of a balanced step, that of {even.name} "
            f"{even.spread('step_slowdown').mean - 1:.0%}."
        )
    steps = min(
        int(result.course.steps[-1])
        for setting in settings
        for result in setting.results
        if result.course is not None
    )
    sentences.append(
        f"All of it is of this model, this data and {steps} steps: a method that is slow to "
        "balance may catch up, and a loss that a small model does not feel may cost a large one."
    )
    return " ".join(sentences)


def _with_range(setting: Setting, number: str, unit: str = "") -> str:
    spread = setting.spread(number)
    seeds = len(setting.results)
    between = f", {spread.low:.4g} to {spread.high:.4g} over {seeds} seeds" if seeds > 1 else ""
    return f"{setting.name} ({unit}{spread.mean:.4g}{between})"


def _listed(settings: list[Setting]) -> str:
    names = [setting.name for setting in settings]
    if len(names) > 4:
        return f"{len(names)} others"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

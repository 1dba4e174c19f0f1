"""Answer of ``titan-moe-lb plan``: verdict, headline, tables and charts."""

from __future__ import annotations

from titan_moe_lb.commands.answer.answer import Answer, Table
from titan_moe_lb.commands.answer.words import GIB, duration, number
from titan_moe_lb.commands.plan import tables
from titan_moe_lb.commands.plan.charts import charts
from titan_moe_lb.commands.plan.clock import Clock
from titan_moe_lb.commands.plan.plan_arguments import PlanArguments
from titan_moe_lb.commands.plan.published_error import ADDED_TIME, SLOW_DOWNS, of_step_times
from titan_moe_lb.commands.plan.result import MEMORY_RESERVE, Plan
from titan_moe_lb.commands.plan.verdict import Gain, Verdict
from titan_moe_lb.commands.plan.what_fits import Alternative
from titan_moe_lb.costmodel.hardware.device import Hardware
from titan_moe_lb.pages.cards import Card

NOTHING = 5e-4
"""Share of a step below which a saving is none."""
FEW_MICRO_BATCHES = 10
"""Number of recorded micro-batches below which a plan does not decide."""


def answer(plan: Plan) -> Answer:
    """Convert a plan to sentences, tables and charts."""
    job = plan.job
    made = [make(plan) for make in tables.TABLES]
    return Answer(
        kind="Plan of a job",
        title=f"{job.model_name} {job.flavor}, {job.num_ranks} × {plan.device.name}",
        cards=_cards(plan),
        verdict=verdict(plan),
        headline=_headline(plan),
        sections=[lambda: charts(plan), *(table for table in made if isinstance(table, Table))],
        footer=device_sources(plan.device),
        numbers=plan.as_json(),
    )


def _cards(plan: Plan) -> list[Card]:
    """Make the cards of the verdict."""
    found, steps = plan.verdict, plan.job.steps
    outcome = found.outcome
    cards = [
        Card(
            "Fastest that fits" if found.fits else "Fastest, but does not fit",
            f"EP {found.ep_degree}",
            f"under {found.load}",
        ),
        Card(
            "Step",
            duration(outcome.step_seconds),
            f"{_slow_down(outcome.step_slowdown)}; {gpu_hours(found.gpu_hours)} for {steps:,} steps",
        ),
        Card(
            "Memory",
            f"{number(outcome.memory_bytes / GIB)} GiB",
            f"of {plan.usable_bytes / GIB:.1f} GiB usable; fits {_room(found)}",
        ),
    ]
    if found.balancing:
        saved = found.balancing
        cards.append(
            Card(
                "Saved by balance",
                f"{number(100 * max(saved.share, 0))} %",
                f"{gpu_hours(saved.gpu_hours)}{saved.by.removeprefix('balance').rstrip(',')}",
            )
        )
    if found.next_degree is not None:
        slower = f"{number(100 * found.next_slower)} % slower"
        close = "; too close to call" if found.is_close else ""
        cards.append(Card("Next degree", f"EP {found.next_degree}", slower + close))
    return cards


def _slow_down(slow_down: float) -> str:
    """Format a slow-down with the band of the published runs."""
    least, most = (1 + (slow_down - 1) / ratio for ratio in reversed(ADDED_TIME))
    band = f" ({least:.2f} to {most:.2f} by published runs)" if slow_down - 1 > NOTHING else ""
    return f"{slow_down:.2f} x balance{band}"


def verdict(plan: Plan) -> list[str]:
    """Write the advice, its saving, and its certainty as sentences."""
    found, lines = plan.verdict, []
    if plan.of_run and plan.of_run.ep_degree != found.ep_degree:
        lines.append(_of_run(plan.of_run))
    if plan.clock:
        lines += _measured(plan.clock)
    need = f"{number(found.outcome.memory_bytes / GIB)} GiB"
    step = f"{duration(found.outcome.step_seconds)} a step"
    if found.fits:
        own = ", the run's own," if plan.of_run and plan.of_run.ep_degree == found.ep_degree else ""
        lines.append(
            f"Verdict: EP {found.ep_degree}{own} is the fastest that fits under {found.load}: {step}, "
            f"{gpu_hours(found.gpu_hours)} for {plan.job.steps:,} steps. It needs {need}, leaves "
            f"{number(found.head_room_bytes / GIB)} GiB free, and fits {_room(found)}."
        )
    else:
        lines.append(
            f"Verdict: no expert-parallel degree fits in {plan.usable_bytes / GIB:.1f} GiB under "
            f"{found.load}. EP {found.ep_degree} would be the fastest: {step}, but it needs {need}."
        )
        lines += map(_alternative, plan.alternatives)
        if not plan.alternatives:
            lines.append(
                "Nothing near fits: not even two changes of batch, ranks and checkpointing."
            )
    if found.balancing:
        lines.append(f"Balancing: at EP {found.ep_degree}, {_saving(found.balancing)}.")
    if found.placements:
        copies = " (copies are a what-if: torchtitan's dispatchers have none)"
        what_if = copies if plan.flags.redundant_experts else ""
        lines.append(f"Placing: {'; '.join(map(_saving, found.placements))}{what_if}.")
    lines.append(f"How sure: {_certainty(plan)}.")
    return lines


def _room(found: Verdict) -> str:
    if found.fits_any_imbalance:
        return "at any imbalance"
    return f"up to an imbalance of {found.largest_imbalance_that_fits or 1.0:.2f}"


def _alternative(one: Alternative) -> str:
    found = one.verdict
    saving = f", {_saving(found.balancing)}" if found.balancing else ""
    return (
        f"Fits: {one.name}: {number(found.outcome.memory_bytes / GIB)} GiB, "
        f"{duration(found.outcome.step_seconds)} a step of {one.tokens_per_step:,} tokens{saving}. "
        f"Add {one.flags}"
    )


def _of_run(found: Verdict) -> str:
    fit = "fits" if found.fits else "does not fit"
    gains = [*([found.balancing] if found.balancing else []), *found.placements]
    saving = "; ".join(map(_saving, gains)) or "balance would save nothing"
    return (
        f"This run: EP {found.ep_degree}, its own, takes {duration(found.outcome.step_seconds)} a step "
        f"under {found.load}, {found.outcome.step_slowdown:.2f} x balance, and {fit}; {saving}."
    )


def _measured(clock: Clock) -> list[str]:
    """Describe the parts of a measured step."""
    measured = clock.measured_seconds
    if clock.is_too_short:
        return [
            f"Measured: {duration(measured)} a step at EP {clock.ep_degree}, which the plan does not "
            f"explain: it takes {duration(measured - clock.unexplained_seconds)}. Compare ranks, tokens "
            "a step and hardware of the job with those of the step that was timed."
        ]
    least, most = (number(100 * seconds / measured) for seconds in clock.imbalance_seconds_range)

    def part(seconds: float) -> str:
        return f"{duration(seconds)} ({number(100 * seconds / measured)} %)"

    rest = (
        f"{part(clock.unexplained_seconds)} is not explained"
        if clock.unexplained_seconds >= 0
        else f"the prediction is {part(-clock.unexplained_seconds)} too long"
    )
    imbalance = (
        f"{part(clock.imbalance_seconds)} is imbalance, by published runs {least} to {most} %"
        if clock.imbalance_seconds
        else "its load is even, or not known (--from-run, --imbalance overload:FACTOR@EP)"
    )
    lines = [
        f"Measured: {duration(measured)} a step at EP {clock.ep_degree}. The plan explains "
        f"{part(clock.balance_seconds)} at balance; {imbalance}; {rest}."
    ]
    if clock.is_foreign:
        lines[0] += " Most is not explained: was it measured on this hardware?"
    return lines


def gpu_hours(hours: float) -> str:
    """Format GPU-hours."""
    return "less than 0.01 GPU-hours" if hours < 0.01 else f"{number(hours)} GPU-hours"


def _saving(gain: Gain) -> str:
    if gain.share < NOTHING:
        return f"{gain.by} would save nothing"
    return (
        f"{gain.by} would save {number(100 * gain.share)} % of a step, {gpu_hours(gain.gpu_hours)}"
    )


def _certainty(plan: Plan) -> str:
    found, run = plan.verdict, plan.run
    if run is None:
        reasons = ["the load is assumed, not measured (--from-run RUN_DIR uses that of a run)"]
    elif run["micro_batches"]:
        loads = min(run["micro_batches"], len(run["last_steps"]))
        reasons = [f"the load is that of {loads:,} recorded micro-batch{'es' if loads > 1 else ''}"]
        if loads < FEW_MICRO_BATCHES:
            reasons[0] += ", too few to decide: record more steps, or lower metrics.log_freq"
    else:
        reasons = [
            "the run recorded whole global batches only, and single micro-batches are less even"
        ]
    if found.next_degree is not None:
        close = ", too close to call" if found.is_close else ""
        slower = number(100 * found.next_slower)
        reasons.append(f"EP {found.next_degree} is {slower} % slower{close}")
    reasons.append(f"slow-downs deviate from published runs by {SLOW_DOWNS}")
    reasons.append(
        f"{of_step_times(plan.device.name)}; ratios depend less on the assumed efficiencies "
        "(docs/explain/cost_model.md)"
    )
    return "; ".join(reasons)


def _headline(plan: Plan) -> list[str]:
    job, device = plan.job, plan.device
    layer = next(iter(job.moe_layers.values()))
    state = max(job.states.values(), key=lambda state: state.num_parameters)
    return [
        f"{job.model_name} {job.flavor} on {job.num_ranks} x {device.name}: "
        f"{len(job.moe_layers)} MoE layers, {layer.num_experts} experts, top {layer.top_k}, "
        f"{job.tokens_per_microbatch:,} tokens a micro-batch, checkpointing {job.checkpointing}.",
        f"Largest rank at EP {job.ep_degree}: rank {state.rank}, {state.num_parameters:,} "
        f"parameters, {state.parameter_bytes / GIB:.2f} GiB; "
        f"{usable_memory(plan.usable_bytes, device)}; {plan.flags.hot_experts} hot "
        f"expert{'s' * (plan.flags.hot_experts > 1)}; {efficiencies(plan.flags)}.",
    ]


def usable_memory(usable_bytes: float, device: Hardware) -> str:
    """Describe the usable memory of a device."""
    assumed = [name for name, source in device.sources.items() if source.startswith("assumed")]
    guesses = ", ".join(f"{name} {getattr(device, name):g}" for name in assumed)
    return (
        f"usable memory {usable_bytes / GIB:.1f} GiB ({MEMORY_RESERVE:.0%} of "
        f"{device.memory_bytes / GIB:.1f} kept free; ! marks what does not fit)"
        + (f"; assumed, not in the file: {guesses}" if assumed else "")
    )


def efficiencies(flags: PlanArguments) -> str:
    """Describe the assumed efficiencies of the device, and the dispatcher."""
    return (
        f"{flags.compute_efficiency:.0%} of peak compute, {flags.network_efficiency:.0%} of "
        f"link bandwidth; {flags.dispatcher} dispatch"
    )


def device_sources(device: Hardware) -> str:
    """List the sources of the device's numbers."""
    sources = "; ".join(f"{name}: {source}" for name, source in device.sources.items())
    return f"Sources of the device's numbers: {sources}."

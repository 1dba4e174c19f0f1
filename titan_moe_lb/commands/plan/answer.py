"""Answer of ``titan-moe-lb plan``: verdict, headline, tables and charts."""

from __future__ import annotations

from titan_moe_lb.commands.answer.answer import Answer, Table
from titan_moe_lb.commands.answer.words import GIB, duration, number
from titan_moe_lb.commands.plan import tables
from titan_moe_lb.commands.plan.charts import charts
from titan_moe_lb.commands.plan.plan_arguments import PlanArguments
from titan_moe_lb.commands.plan.result import MEMORY_RESERVE, Plan
from titan_moe_lb.commands.plan.verdict import Gain
from titan_moe_lb.costmodel.hardware.device import Hardware


def answer(plan: Plan) -> Answer:
    """Convert a plan to sentences, tables and charts."""
    job = plan.job
    made = [make(plan) for make in tables.TABLES]
    return Answer(
        kind="Plan of a job",
        title=f"{job.model_name} {job.flavor}, {job.num_ranks} × {plan.device.name}",
        verdict=verdict(plan),
        headline=_headline(plan),
        sections=[lambda: charts(plan), *(table for table in made if isinstance(table, Table))],
        footer=device_sources(plan.device),
        numbers=plan.as_json(),
    )


def verdict(plan: Plan) -> list[str]:
    """Write the advice, its saving, and its certainty as sentences."""
    found = plan.verdict
    if found.ep_degree is None or found.outcome is None:
        return [
            f"Verdict: no expert-parallel degree fits in {plan.usable_bytes / GIB:.1f} GiB under "
            f"{found.load}. Use more ranks, checkpointing or a smaller local batch."
        ]
    outcome = found.outcome
    lines = [
        f"Verdict: EP {found.ep_degree} is the fastest that fits under {found.load}: "
        f"{duration(outcome.step_seconds)} a step, {number(found.gpu_hours)} GPU-hours for "
        f"{plan.job.steps:,} steps. It needs {number(outcome.memory_bytes / GIB)} GiB, leaves "
        f"{number(found.head_room_bytes / GIB)} GiB free, and fits up to an imbalance of "
        f"{found.largest_imbalance_that_fits or 1.0:.2f}."
    ]
    if found.balancing:
        lines.append(f"Balancing: {_saving(found.balancing)}.")
    if found.placements:
        copies = " (copies are a what-if: torchtitan's dispatchers have none)"
        what_if = copies if plan.flags.redundant_experts else ""
        lines.append(f"Placing: {'; '.join(map(_saving, found.placements))}{what_if}.")
    lines.append(f"How sure: {_certainty(plan)}.")
    return lines


def _saving(gain: Gain) -> str:
    if gain.share <= 0:
        return f"{gain.by} would save nothing"
    return (
        f"{gain.by} would save {number(100 * gain.share)} % of a step, "
        f"{number(gain.gpu_hours)} GPU-hours"
    )


def _certainty(plan: Plan) -> str:
    found, run = plan.verdict, plan.run
    if run is None:
        reasons = ["the load is assumed, not measured (--from-run RUN_DIR uses that of a run)"]
    elif run["micro_batches"]:
        number_of_loads = min(run["micro_batches"], len(run["last_steps"]))
        reasons = [f"the load is that of {number_of_loads:,} recorded micro-batches"]
    else:
        reasons = [
            "the run recorded whole global batches only, and single micro-batches are less even"
        ]
    if found.next_degree is not None:
        close = ", too close to call" if found.is_close else ""
        slower = number(100 * found.next_slower)
        reasons.append(f"EP {found.next_degree} is {slower} % slower{close}")
    reasons.append(
        "absolute times depend on the assumed efficiencies, ratios depend less (docs/explain/cost_model.md)"
    )
    return "; ".join(reasons)


def _headline(plan: Plan) -> list[str]:
    job, device = plan.job, plan.device
    layer = next(iter(job.moe_layers.values()))
    state = max(job.states.values(), key=lambda state: state.num_parameters)
    return [
        f"{job.model_name} {job.flavor} on {job.num_ranks} x {device.name}: "
        f"{len(job.moe_layers)} MoE layers, {layer.num_experts} experts, top {layer.top_k}, "
        f"{job.tokens_per_microbatch} tokens a micro-batch, checkpointing {job.checkpointing}.",
        f"Largest rank at EP {job.ep_degree}: rank {state.rank}, {state.num_parameters:,} "
        f"parameters, {state.parameter_bytes / GIB:.2f} GiB; "
        f"{usable_memory(plan.usable_bytes, device)}; {plan.flags.hot_experts} hot "
        f"expert(s); {efficiencies(plan.flags)}.",
    ]


def usable_memory(usable_bytes: float, device: Hardware) -> str:
    """Describe the usable memory of a device."""
    return (
        f"usable memory {usable_bytes / GIB:.1f} GiB ({MEMORY_RESERVE:.0%} of "
        f"{device.memory_bytes / GIB:.1f} kept free; ! marks what does not fit)"
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

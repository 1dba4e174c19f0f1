"""The verdict in sentences."""

from __future__ import annotations

from titan_moe_lb.commands.plan.plan_arguments import PlanArguments
from titan_moe_lb.commands.plan.result import MEMORY_RESERVE, Plan
from titan_moe_lb.commands.plan.verdict import Gain
from titan_moe_lb.costmodel.hardware.device import Hardware

GIB = 2**30

CAPACITY = (
    "Capacity of a rank's buffers, for the loads of the run's second half: the factor over its "
    "balanced tokens (Megatron's moe_expert_rank_capacity_factor), the same as a share of the worst "
    "case (non_blocking_capacity_factor of torchtitan's HybridEP), and the memory with such buffers "
    "in every MoE layer"
)


def number(value: float) -> str:
    """Three digits of a figure of any size."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds, or milliseconds where there are few."""
    return f"{number(seconds)} s" if seconds >= 0.1 else f"{number(seconds * 1e3)} ms"


def usable_memory(usable_bytes: float, device: Hardware) -> str:
    return (
        f"usable memory {usable_bytes / GIB:.1f} GiB ({MEMORY_RESERVE:.0%} of "
        f"{device.memory_bytes / GIB:.1f} kept free)"
    )


def efficiencies(flags: PlanArguments) -> str:
    """What is assumed of the device, and the dispatcher."""
    return (
        f"{flags.compute_efficiency:.0%} of peak compute, {flags.network_efficiency:.0%} of "
        f"link bandwidth; {flags.dispatcher} dispatch"
    )


def verdict(plan: Plan) -> list[str]:
    """What to do, what it would buy, and how sure that is."""
    found = plan.verdict
    if found.ep_degree is None or found.outcome is None:
        return [
            f"Verdict: under {found.load} no degree fits in {plan.usable_bytes / GIB:.1f} GiB. More "
            "ranks, checkpointing, or a smaller local batch"
        ]
    outcome = found.outcome
    lines = [
        f"Verdict: EP {found.ep_degree} is the fastest that fits under {found.load}: "
        f"{duration(outcome.step_seconds)} a step, {number(found.gpu_hours)} GPU-hours for "
        f"{plan.job.steps:,} steps; {number(outcome.memory_bytes / GIB)} GiB, "
        f"{number(found.head_room_bytes / GIB)} to spare, which lasts up to an imbalance of "
        f"{found.largest_imbalance_that_fits or 1.0:.2f}"
    ]
    if found.balancing:
        lines.append(f"Balancing: {_bought(found.balancing)}")
    if found.placements:
        lines.append(f"Placing: {'; '.join(map(_bought, found.placements))}{_copies(plan)}")
    lines.append(f"How sure: {_sure(plan)}")
    return lines


def _bought(gain: Gain) -> str:
    if gain.share <= 0:
        return f"{gain.by} would buy nothing"
    return (
        f"{gain.by} would buy {number(100 * gain.share)} % of a step, "
        f"{number(gain.gpu_hours)} GPU-hours"
    )


def _copies(plan: Plan) -> str:
    if not plan.flags.redundant_experts:
        return ""
    return " (copies are a what-if: torchtitan's dispatchers have none)"


def _sure(plan: Plan) -> str:
    found, run = plan.verdict, plan.run
    said = []
    if run is None:
        said.append("the load is assumed, not measured (--from-run takes a run's)")
    elif run["micro_batches"]:
        number_of_loads = min(run["micro_batches"], len(run["last_steps"]))
        said.append(f"the load is that of {number_of_loads:,} recorded micro-batches")
    else:
        said.append(
            "the run has recorded whole global batches alone, and single micro-batches are less even"
        )
    if found.next_degree is not None:
        much = f"EP {found.next_degree} is {number(100 * found.next_slower)} % slower"
        said.append(f"{much}, too close to call" if found.is_close else much)
    said.append(
        "absolute times rest on the assumed efficiencies, ratios less so (docs/planning.md)"
    )
    return "; ".join(said)

"""Tables about the buffers of a rank, for the loads of a run."""

from __future__ import annotations

from titan_moe_lb.commands.answer.answer import Column, Table
from titan_moe_lb.commands.answer.words import decimals, memory, number, share
from titan_moe_lb.commands.plan.result import Plan


def capacity(plan: Plan) -> Table | None:
    """Capacity factors that drop no token, or a share; None without recorded micro-batches."""
    if not plan.degrees[0].capacity:
        return None
    return Table(
        title="Capacity",
        columns=(
            Column(title="EP"),
            Column(title="dropped", show=share),
            Column(title="capacity factor", show=decimals(3)),
            Column(title="share of the worst case", show=decimals(4)),
            Column(title="memory", unit="GiB", show=number),
        ),
        groups=[
            [
                (
                    degree.ep_degree,
                    row.drop_share,
                    row.capacity_factor,
                    row.non_blocking_capacity_factor,
                    memory(row.memory_bytes, row.fits),
                )
                for row in degree.capacity
            ]
            for degree in plan.degrees
        ],
        text=[
            "Buffers of a rank for the loads of the run's second half. The capacity factor is relative "
            "to its balanced tokens (Megatron's moe_expert_rank_capacity_factor). The share of the worst "
            "case is torchtitan's non_blocking_capacity_factor of HybridEP. The memory has such buffers "
            "in every MoE layer."
        ],
    )


def overruns(plan: Plan) -> Table | None:
    """DistMoE's capacities; None without recorded micro-batches."""
    if not plan.degrees[0].overruns:
        return None
    compared = plan.degrees[0].overruns[0].micro_batches
    return Table(
        title="Overruns",
        columns=(
            Column(title="EP"),
            Column(title="overruns", show=share),
            Column(title="scratch or vmm", show=decimals(3)),
            Column(title="activation slot", show=decimals(3)),
            Column(title="worst case", show=decimals(3)),
        ),
        groups=[
            [
                (
                    degree.ep_degree,
                    row.overrun_share,
                    row.scratch_capacity_factor,
                    row.activation_slot_capacity_factor,
                    row.worst_capacity_factor,
                )
                for row in degree.overruns
            ]
            for degree in plan.degrees
        ],
        text=[
            "DistMoE's capacity factors that none of the run's micro-batches overruns, or at most "
            f"this share: {compared} of the planned size, from its second half. An overrun of "
            "scratch_capacity_factor is an error; with vmm_capacity_factor it goes to host memory, "
            "and an overrun of that factor is the error. An overrun of "
            "activation_slot_capacity_factor is recomputed."
        ],
    )

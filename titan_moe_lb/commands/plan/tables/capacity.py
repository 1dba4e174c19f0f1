"""Buffer sizes of a rank for the loads of a run."""

from __future__ import annotations

from titan_moe_lb.commands.answer.answer import Column, Table
from titan_moe_lb.commands.answer.words import decimals, memory, number, share
from titan_moe_lb.commands.plan.result import Plan


def table(plan: Plan) -> Table | None:
    """Build the table; None without recorded micro-batches."""
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

"""DistMoE's capacities for the loads of a run."""

from __future__ import annotations

from titan_moe_lb.commands.answer.answer import Column, Table
from titan_moe_lb.commands.answer.words import decimals, share
from titan_moe_lb.commands.plan.result import Plan


def table(plan: Plan) -> Table | None:
    """Build the table; None without recorded micro-batches."""
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
            "DistMoE's capacity factors that none, or this share, of the "
            f"{compared} micro-batches of the planned size, from the run's second half, overruns. An overrun of "
            "scratch_capacity_factor is an error; with vmm_capacity_factor it goes to host memory, "
            "and an overrun of that factor is the error. An overrun of "
            "activation_slot_capacity_factor is recomputed."
        ],
    )
